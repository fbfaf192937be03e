"""Input that cannot work: each gets the service's own answer and leaves no debris (SPEC 2.1, 3, 6)."""

import http.client
import io
import itertools
import json
import zipfile

import pytest
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

import support
from support import BASE_IMAGE, error_of

NAMES = (f"bad-{number}" for number in itertools.count(1))
UNKNOWN_IMAGE = "arn:aws:lambda:us-east-1:000000000000:microvm-image:unknown"
UNKNOWN_MICROVM = "microvm-00000000-0000-4000-8000-000000000000"


@pytest.fixture(scope="module")
def impatient():
    """A server that gives an app little time to listen, so that waiting for one that never does is short."""
    with support.serving("ready_timeout_seconds = 8\n") as server:
        yield server


def files_of(server, room: str) -> set[str]:
    return {str(path) for path in (server.data_dir / room).rglob("*") if path.is_file()}


def fails(server, data: bytes | None, uri: str | None = None, seconds: float = support.BUILD_SECONDS) -> tuple[str, str]:
    """Builds an image that must fail. Returns the build's reason and the build log, after looking for debris."""
    name = next(NAMES)
    before = files_of(server, "images")
    if uri is None:
        uri = support.upload(server, f"{name}.zip", data)
    arn = support.create_image(server, name, uri)["imageArn"]
    image = support.wait_image(server, arn, "CREATE_FAILED", seconds)
    assert image["latestFailedImageVersion"] == "1.0"
    assert image.get("latestActiveImageVersion") is None
    version = server.microvms.get_microvm_image_version(imageIdentifier=arn, imageVersion="1.0")
    assert (version["state"], version["status"]) == ("FAILED", "INACTIVE")
    build = support.build_of(server, arn)
    assert build["buildState"] == "FAILED"
    log = server.hearth("logs", name).stdout
    refusal = ("ResourceNotFoundException", f"No active version found for MicroVM image {arn}", 404)
    assert error_of(server.microvms.run_microvm, imageIdentifier=arn) == refusal

    support.eventually(lambda: not support.processes_of(server.data_dir), "the build's processes to be gone")
    assert not list((server.data_dir / "tmp").iterdir()), "scratch files are left"
    assert not support.mounts_of(server.data_dir), "mounts are left"
    assert not list((server.data_dir / "microvms").iterdir()), "a machine's files are left"
    assert files_of(server, "images") == before, "half an image is left"
    server.microvms.delete_microvm_image(imageIdentifier=arn)
    return build["stateReason"], log


class TestArchives:
    def test_a_missing_dockerfile(self, server):
        reason, _ = fails(server, support.zip_of({"app.py": "print('hello')"}))
        assert reason.startswith("ARCHIVE_DOCKERFILE_NOT_FOUND")

    def test_a_dockerfile_that_is_not_at_the_root(self, server):
        reason, _ = fails(server, support.zip_of({"app/Dockerfile": f"FROM {BASE_IMAGE}\n"}))
        assert reason.startswith("ARCHIVE_DOCKERFILE_NOT_FOUND")

    @pytest.mark.parametrize("damage", ["no zip at all", "cut short", "empty"])
    def test_a_corrupt_zip(self, server, damage):
        whole = support.zip_of({"Dockerfile": f"FROM {BASE_IMAGE}\n", "filler": "x" * 10_000})
        data = {"no zip at all": b"this is not a zip", "cut short": whole[: len(whole) // 2], "empty": b""}[damage]
        reason, _ = fails(server, data)
        assert reason.startswith("ARCHIVE_INVALID")

    @pytest.mark.parametrize("name", ["../escaped", "context/../../escaped", "/escaped"])
    def test_a_path_that_escapes(self, server, name):
        reason, _ = fails(server, support.zip_of({"Dockerfile": f"FROM {BASE_IMAGE}\nCMD [\"true\"]\n", name: "gotcha"}))
        assert reason.startswith("ARCHIVE_INVALID")
        assert not list(server.data_dir.rglob("escaped"))

    def test_a_link_that_escapes(self, server):
        data = io.BytesIO()
        with zipfile.ZipFile(data, "w") as archive:
            archive.writestr("Dockerfile", f"FROM {BASE_IMAGE}\nCOPY secret /secret\nCMD [\"true\"]\n")
            link = zipfile.ZipInfo("secret")
            link.external_attr = 0o120777 << 16
            archive.writestr(link, "../../../../../../../../etc/shadow")
        reason, log = fails(server, data.getvalue())
        assert reason.startswith("The container image build failed. COPY secret /secret: "), "it is looked for in the context, where it leads to nothing"
        assert "root:" not in log


class TestObjects:
    """SPEC 2.1: the codes of the troubleshooting page."""

    def test_a_missing_key(self, server):
        support.upload(server, "present.zip", b"x")
        reason, _ = fails(server, None, uri="s3://artifacts/absent.zip")
        assert reason.startswith("S3_NO_SUCH_KEY")

    def test_a_missing_bucket(self, server):
        reason, _ = fails(server, None, uri="s3://no-such-bucket/x.zip")
        assert reason.startswith("S3_NO_SUCH_BUCKET")

    @pytest.mark.parametrize("uri", ["https://example.org/x.zip", "s3://bucket", "artifacts/x.zip"])
    def test_something_that_is_no_s3_uri(self, server, uri):
        message = "CodeArtifact URI must be a valid S3 URI in the format: s3://<bucket>/<key>"
        assert error_of(support.create_image, server, "no-uri", uri) == ("ValidationException", message, 400)


class TestDockerfiles:
    def test_a_failing_step_is_told_with_its_output_in_the_log(self, server):
        reason, log = fails(server, support.zip_of({"Dockerfile": f"FROM {BASE_IMAGE}\nRUN echo about to fail && exit 7\nCMD [\"true\"]\n"}))
        assert reason.startswith("The container image build failed. RUN echo about to fail && exit 7: "), reason
        assert "about to fail" in log and "ended with exit code 7" in log

    def test_a_dockerfile_that_does_not_parse(self, server):
        reason, _ = fails(server, support.zip_of({"Dockerfile": "BREW coffee\n"}))
        assert reason.startswith("The container image build failed. ") and "line 1" in reason and "BREW" in reason, reason

    def test_nothing_to_run(self, server):
        reason, _ = fails(server, support.zip_of({"Dockerfile": f"FROM {BASE_IMAGE}\nENTRYPOINT []\nCMD []\n"}))
        assert reason


class TestApps:
    def test_one_that_exits_at_once(self, server):
        app = f'FROM {BASE_IMAGE}\nEXPOSE 5000\nCMD ["sh", "-c", "echo I give up; exit 3"]\n'
        reason, log = fails(server, support.zip_of({"Dockerfile": app}))
        assert "3" in reason, "the exit code is told"
        assert "I give up" in log, "what the app said is in the log"

    def test_one_whose_program_is_missing(self, server):
        reason, _ = fails(server, support.zip_of({"Dockerfile": f'FROM {BASE_IMAGE}\nEXPOSE 5000\nCMD ["/no/such/program"]\n'}))
        assert reason

    def test_one_that_is_busy_and_never_listens(self, impatient):
        app = f'FROM {BASE_IMAGE}\nEXPOSE 5000\nCMD ["sh", "-c", "while :; do :; done"]\n'
        reason, _ = fails(impatient, support.zip_of({"Dockerfile": app}))
        assert reason == "The application did not accept connections on an exposed port within PT8S."


class TestUnknownThings:
    """SPEC 3.3, word for word."""

    @pytest.mark.parametrize("call", ["get_microvm_image", "delete_microvm_image", "list_microvm_image_versions"])
    def test_an_unknown_image(self, server, call):
        expected = ("ResourceNotFoundException", f"MicroVMImage not found for MicroVMImageID: {UNKNOWN_IMAGE}", 404)
        assert error_of(getattr(server.microvms, call), imageIdentifier=UNKNOWN_IMAGE) == expected

    def test_an_unknown_version(self, server, image):
        expected = ("ResourceNotFoundException", f"MicroVMImage not found for MicroVMImage: {image.arn}, Version: 9.0", 404)
        assert error_of(server.microvms.get_microvm_image_version, imageIdentifier=image.arn, imageVersion="9.0") == expected

    def test_running_an_unknown_image(self, server):
        expected = ("ResourceNotFoundException", f"No active version found for MicroVM image {UNKNOWN_IMAGE}", 404)
        assert error_of(server.microvms.run_microvm, imageIdentifier=UNKNOWN_IMAGE) == expected

    def test_running_an_unknown_version(self, server, image):
        expected = ("ResourceNotFoundException", f"No active version found for MicroVM image {image.arn} and version 9.0", 404)
        assert error_of(server.microvms.run_microvm, imageIdentifier=image.arn, imageVersion="9.0") == expected

    @pytest.mark.parametrize("call", ["get_microvm", "suspend_microvm", "resume_microvm", "terminate_microvm"])
    def test_an_unknown_microvm(self, server, call):
        expected = ("ResourceNotFoundException", f"MicroVM not found: {UNKNOWN_MICROVM}", 404)
        assert error_of(getattr(server.microvms, call), microvmIdentifier=UNKNOWN_MICROVM) == expected

    def test_a_bare_name(self, server):
        code, message, status = error_of(server.microvms.get_microvm_image, imageIdentifier="flask-hello")
        assert (code, status) == ("ValidationException", 400) and message.startswith("Invalid ARN format")
        expected = ("ValidationException", "Malformed ARN - doesn't start with 'arn:'", 400)
        assert error_of(server.microvms.run_microvm, imageIdentifier="flask-hello") == expected

    def test_another_account_s_image(self, server):
        arn = UNKNOWN_IMAGE.replace("000000000000", "999999999999")
        code, _, status = error_of(server.microvms.get_microvm_image, imageIdentifier=arn)
        assert (code, status) == ("AccessDeniedException", 403)

    def test_a_name_that_is_taken(self, server, image):
        expected = ("ValidationException", "A MicroVM image with the name 'flask-hello' already exists in this account", 400)
        assert error_of(support.create_image, server, "flask-hello", "s3://artifacts/flask-hello.zip") == expected

    def test_a_memory_size_that_is_not_offered(self, server):
        options = {"resources": [{"minimumMemoryInMiB": 700}]}
        code, message, status = error_of(support.create_image, server, "odd-size", "s3://artifacts/x.zip", **options)
        assert (code, status) == ("ValidationException", 400)
        assert "The requested memory size of 700 MiB is not supported by base MicroVM image" in message

    def test_an_idle_time_below_the_least(self, server, image):
        policy = support.idle_policy(idle=0)
        body = json.dumps({"imageIdentifier": image.arn, "idlePolicy": policy})
        status, answer, _ = signed(server, "POST", "/2025-09-09/microvms", body)
        assert status == 400
        assert "Member must have value greater than or equal to 1" in answer["message"]


def signed(server, method: str, path: str, body: str | bytes = "", secret: str | None = None) -> tuple[int, dict, http.client.HTTPMessage]:
    """A request that no SDK would send, signed as one would."""
    connect = server.connect
    request = AWSRequest(method, connect["api"] + path, data=body, headers={"Content-Type": "application/json"})
    credentials = Credentials(connect["accessKeyId"], secret or connect["secretAccessKey"])
    SigV4Auth(credentials, "lambda", connect["region"]).add_auth(request)
    connection = http.client.HTTPConnection(connect["api"].removeprefix("http://"), timeout=30)
    try:
        connection.request(method, path, body=body, headers=dict(request.headers))
        response = connection.getresponse()
        return response.status, json.loads(response.read() or b"{}"), response.headers
    finally:
        connection.close()


class TestRequests:
    """SPEC 3.1."""

    @pytest.mark.parametrize("body", ["{", "[]", "", "null", '{"name": 5}', "\x00"])
    def test_malformed_json(self, server, body):
        status, answer, headers = signed(server, "POST", "/2025-09-09/microvm-images", body)
        assert status == 400, answer
        assert headers["x-amzn-errortype"].startswith("ValidationException")

    def test_missing_members_are_told_in_the_service_s_grammar(self, server):
        status, answer, headers = signed(server, "POST", "/2025-09-09/microvm-images", '{"name": "bad name!"}')
        assert (status, headers["x-amzn-errortype"]) == (400, "ValidationException")
        assert " validation errors detected: " in answer["message"]
        assert "Value null at 'baseImageArn' failed to satisfy constraint: Member must not be null" in answer["message"]
        assert "Value 'bad name!' at 'name' failed to satisfy constraint" in answer["message"]

    def test_an_unknown_path_is_a_json_404(self, server):
        status, answer, _ = signed(server, "GET", "/2025-09-09/no-such-thing")
        assert status == 404 and isinstance(answer, dict)

    def test_a_wrong_secret(self, server):
        status, _, headers = signed(server, "GET", "/2025-09-09/microvms", secret="wrong")
        assert status == 403
        code, _, status = error_of(server.client("lambda-microvms", aws_secret_access_key="wrong").list_microvms)
        assert status == 403 and code in ("InvalidSignatureException", "AccessDeniedException", "SignatureDoesNotMatch")

    def test_an_unknown_key(self, server):
        code, _, status = error_of(server.client("lambda-microvms", aws_access_key_id="AKIAUNKNOWN").list_microvms)
        assert status == 403 and code in ("UnrecognizedClientException", "InvalidClientTokenId", "AccessDeniedException")

    def test_a_wrong_secret_for_s3(self, server):
        _, _, status = error_of(server.client("s3", aws_secret_access_key="wrong").list_buckets)
        assert status == 403

    def test_no_signature_at_all(self, server):
        connection = http.client.HTTPConnection(server.connect["api"].removeprefix("http://"), timeout=30)
        connection.request("GET", "/2025-09-09/microvms")
        assert connection.getresponse().status == 403
        connection.close()

    def test_what_is_not_there_yet_says_so(self, server, image):
        code, message, status = error_of(
            server.microvms.create_microvm_shell_auth_token, microvmIdentifier=UNKNOWN_MICROVM, expirationInMinutes=5
        )
        assert status >= 400 and message, "a clear answer, not a hang or an empty error"
