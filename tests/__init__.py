"""hvctl's tests: real libvirt, real qemu-img, real guests."""
