"""Errors of the storage: a full disk is named when a file is written."""

import pytest

from megat2i.files import DataFileError, PendingFile


@pytest.mark.parametrize("size", [1, 3 << 20])  # found at the flush, and at the write
def test_a_full_disk_is_one_error_that_names_the_file(tmp_path, size):
    file = PendingFile(tmp_path / "a.bin")
    file._file.close()
    file._file = open("/dev/full", "wb", buffering=1 << 20)  # noqa: SIM115 (discard closes it)
    with pytest.raises(DataFileError, match=r"a\.bin: the storage failed .No space.*\. Free space"):
        file.write(bytes(size))
        file.flush_to_disk()
    file.discard()
    assert not list(tmp_path.iterdir())
