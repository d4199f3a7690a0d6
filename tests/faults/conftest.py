"""The fixture of the fault tests: a disk that can be filled."""

from tests.disks import small_disk  # noqa: F401
