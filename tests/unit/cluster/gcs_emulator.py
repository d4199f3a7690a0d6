"""Google Cloud Storage on this machine: gcp-storage-emulator, and what it lacks of the XML interface.

obstore writes by that interface. The emulator takes no condition of a write, answers without generations, and does not
list.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from xml.sax.saxutils import escape

from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

from tests.faults.service import free_port


@contextmanager
def gcs_emulator(bucket: str) -> Iterator[str]:
    """The URL of an emulator with an empty `bucket`."""
    plain = server.HANDLERS
    own = [
        (r"^/(?P<bucket_name>[-.\w]+)$", {server.GET: list_bucket}),
        (r"^/(?P<bucket_name>[-.\w]+)/(?P<object_id>.*[^/]+)$", {server.GET: download, server.PUT: upload}),
    ]
    server.HANDLERS = (*plain[:-1], *own)
    running = server.create_server("127.0.0.1", port := free_port(), in_memory=True, default_bucket=bucket)
    running.start()  # it answers one request at a time, so that a condition and its write are one
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        running.stop()
        server.HANDLERS = plain


def generation(storage, params) -> str:
    """The generation of an object, which each write changes; "0" where there is none."""
    try:
        return str(storage.get_file_obj(params["bucket_name"], params["object_id"])["generation"])
    except NotFound:
        return "0"


def upload(request, response, storage, *args, **kwargs):
    """Write an object unless its generation is another than that of the header x-goog-if-generation-match."""
    before = generation(storage, request.params)
    if request.get_header("x-goog-if-generation-match", before) != before:
        response.status = server.HTTPStatus.PRECONDITION_FAILED
        return
    objects.xml_upload(request, response, storage)
    made = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
    made["generation"] = str(int(before) + 1)  # the emulator's is the time in milliseconds
    put_headers(response, made)


def download(request, response, storage, *args, **kwargs):
    objects.download(request, response, storage)
    if generation(storage, request.params) != "0":
        put_headers(response, storage.get_file_obj(request.params["bucket_name"], request.params["object_id"]))


def put_headers(response, found) -> None:
    response["ETag"] = f'"{found["md5Hash"]}"'
    response["x-goog-generation"] = str(found["generation"])
    response["Last-Modified"] = "Mon, 30 Nov 2026 00:00:00 GMT"


def list_bucket(request, response, storage, *args, **kwargs):
    prefix = request.query.get("prefix", [""])[0]
    found, _ = storage.get_file_list(request.params["bucket_name"], prefix=prefix)
    contents = "".join(
        f"<Contents><Key>{escape(f['name'])}</Key><Size>{f['size']}</Size>"
        f"<LastModified>2026-11-30T00:00:00Z</LastModified><ETag>x</ETag></Contents>" for f in found
    )
    response["Content-Type"] = "application/xml"
    response.write(f"<ListBucketResult>{contents}</ListBucketResult>")
