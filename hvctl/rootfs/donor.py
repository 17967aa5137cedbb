"""The kernel that disks get whose trees have none: that of the image which the settings name, and which hvctl built."""

from __future__ import annotations

from hvctl.errors import NotFound, Unsupported
from hvctl.host import Host
from hvctl.model import Image, Provision
from hvctl.rootfs import published


def get(host: Host, wanted_by: str) -> Image:
    """That image, its kernel, initrd and modules there. Raises NotFound, or Unsupported when it has none to give."""
    name = host.config.image
    image = published.find_image(host, name)
    if image is None:
        raise NotFound(
            f"a VM of image {wanted_by!r} needs the kernel of image {name!r}, which is not here",
            hint=f"hvctl image build {name}",
        )
    is_built = image.provision is Provision.CREDENTIALS and image.has_tree
    if image.kernel is None or image.initrd is None or not is_built:
        raise Unsupported(
            f"a VM of image {wanted_by!r} needs a kernel, and image {name!r}, which the settings name, has none to give",
            hint="hvctl image build debian-12; HVCTL_IMAGE=debian-12 hvctl ...",
        )
    return image
