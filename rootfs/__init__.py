"""The image builder: Debian packages in, a directory with kernel, initramfs, root file system and manifest out."""
