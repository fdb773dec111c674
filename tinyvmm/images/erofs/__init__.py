"""A directory tree as an EROFS image that exists nowhere: a block device made on demand.

EROFS is Linux's read-only file system (fs/erofs/erofs_fs.h, Documentation/filesystems/erofs.rst).
Uncompressed, it is simple enough to be made up while it is read: a superblock; inodes of 64 bytes,
each found by a number that is its place; directories as sorted blocks of names; and file data that
lies in whole blocks, which here are the host's own files. So names and metadata are what we make,
and data is read from the host when, and only when, the guest reads it.

How to read it: format.py is the layout, bytes and no files; sources.py finds directories of the
host again and unites them as the 9P root does; plan.py gives every directory, inode and file its
place, a directory when it is first needed (files.py keeps what the data blocks hold, xattrs.py
reads what stands behind an inode); image.py answers reads; contents.py opens the files and sees to
it that a changed one is an error, never wrong data; writer.py puts an image into a file.
docs/erofs.md tells it with figures.
"""
