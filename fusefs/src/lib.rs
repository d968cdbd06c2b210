//! Views of a backup as FUSE file systems.
