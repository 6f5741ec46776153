//! Guest images: Debian kernel and initramfs from packages, and their cache.
