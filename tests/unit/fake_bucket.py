"""Stand-ins for object storage and for the clock between two requests to it."""

from pyarrow.fs import LocalFileSystem, SubTreeFileSystem


class Bucket:
    """A folder behind pyarrow's file system interface, which counts its operations and can be out of reach."""

    def __init__(self, root):
        self.inner = SubTreeFileSystem(str(root), LocalFileSystem())
        self.opened = []
        self.asked = 0
        self.down = False

    def _check(self):
        self.asked += 1
        if self.down:
            raise OSError("When reading s3://secret-bucket: AWS Error NETWORK_CONNECTION")

    def open_input_stream(self, path):
        self._check()
        self.opened.append(path)
        return self.inner.open_input_stream(path)

    def open_output_stream(self, path):
        self._check()
        return self.inner.open_output_stream(path)

    def get_file_info(self, what):
        self._check()
        return self.inner.get_file_info(what)

    def create_dir(self, path, recursive=True):
        self._check()
        self.inner.create_dir(path, recursive=recursive)

    def delete_file(self, path):
        self._check()
        self.inner.delete_file(path)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now
