"""Storage that stands on this machine."""

import pytest


@pytest.fixture(scope="module")
def s3_server():
    """moto's S3 on this machine, with a bucket `bucket`; clients find it by their environment."""
    from moto.server import ThreadedMotoServer
    from pyarrow.fs import FileType, S3FileSystem

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }.items():  # fmt: skip
            patch.setenv(name, value)
        s3 = S3FileSystem(endpoint_override=f"http://{host}:{port}", allow_bucket_creation=True)
        s3.create_dir("bucket")
        assert s3.get_file_info("bucket").type == FileType.Directory
        yield
    server.stop()


@pytest.fixture(scope="module")
def gcs_server():
    """Google Cloud Storage on this machine, with a bucket `bucket`; clients find it by their environment."""
    from tests.unit.cluster.gcs_emulator import gcs_emulator

    with gcs_emulator("bucket") as url, pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", url)
        patch.setenv("GOOGLE_BEARER_TOKEN", "anyone's")  # obstore's; pyarrow is told by the URL
        yield


@pytest.fixture(scope="module", params=["S3", "Google Cloud"])
def bucket(request):
    """The URL of a bucket on each provider that has conditional writes."""
    request.getfixturevalue("s3_server" if request.param == "S3" else "gcs_server")
    return "s3://bucket" if request.param == "S3" else "gs://anonymous@bucket"
