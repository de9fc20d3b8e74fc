"""Build images from Debian packages: a kernel, an initramfs, a root file system and a manifest."""
