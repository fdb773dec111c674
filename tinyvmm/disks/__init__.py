"""What a virtual disk keeps its sectors in: files and devices of the host, in three forms.

files.py opens, locks, reads and writes one file. A RawDisk (raw.py) is such a file as it is. A
Qcow2Image (qcow2.py) finds its sectors by tables, in itself or in a backing image. An OverlayDisk
(overlay.py) is a qcow2 image that takes writes for an image below it, which stays as it is.
opening.py makes one of them out of what the user said. docs/disks.md has formats and guarantees.
"""
