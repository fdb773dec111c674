"""OCI images: where they come from, how they are kept, and what they say of a run.

How to read it: reference (what an image is called), spec (manifests and indexes), config (what an
image wants run), then the sources: registry, with credentials and authorisation, layout and
archive; store (what is kept), unpack and tree_writer (a layer becomes a directory), pull (all of it
together), layer (a directory becomes a layer).
"""
