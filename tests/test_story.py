"""The story a user goes through, told with boto3: from a directory with a Dockerfile to MicroVMs that sleep and wake."""

import re
import time

import support
from support import FLASK_HELLO, FLASK_PORT, error_of, idle_policy

UUID = "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"


class Test1TheArchiveReachesTheEmbeddedS3:
    def test_it_comes_back_as_it_went_in(self, server):
        data = support.zip_directory(FLASK_HELLO)
        uri = support.upload(server, "story/flask-hello.zip", data)
        assert uri == "s3://artifacts/story/flask-hello.zip"
        s3 = server.client("s3")
        assert s3.get_object(Bucket="artifacts", Key="story/flask-hello.zip")["Body"].read() == data
        listed = s3.list_objects_v2(Bucket="artifacts", Prefix="story/")["Contents"]
        assert [(found["Key"], found["Size"]) for found in listed] == [("story/flask-hello.zip", len(data))]


class Test2TheArchiveBecomesAnImage:
    """SPEC 5.2, 5.3, 6.2."""

    def test_creating_is_answered_at_once(self, image):
        created = image.created
        assert created["ResponseMetadata"]["HTTPStatusCode"] == 201
        assert created["state"] == "CREATING"
        assert created["imageVersion"] == "1.0"
        assert created["imageArn"] == "arn:aws:lambda:us-east-1:000000000000:microvm-image:flask-hello"
        assert created["resources"] == [{"minimumMemoryInMiB": 512}]
        assert created["egressNetworkConnectors"] == [
            "arn:aws:lambda:us-east-1:aws:network-connector:aws-network-connector:INTERNET_EGRESS"
        ]

    def test_it_goes_from_creating_to_created_and_activates_its_version(self, server, image):
        assert image.states == ["CREATING", "CREATED"]
        found = server.microvms.get_microvm_image(imageIdentifier=image.arn)
        assert found["latestActiveImageVersion"] == "1.0"
        version = server.microvms.get_microvm_image_version(imageIdentifier=image.arn, imageVersion="1.0")
        assert (version["state"], version["status"]) == ("SUCCESSFUL", "ACTIVE")
        versions = server.microvms.list_microvm_image_versions(imageIdentifier=image.arn)["items"]
        assert [found["imageVersion"] for found in versions] == ["1.0"]

    def test_build_output_is_readable_while_it_runs(self, image):
        assert "FROM" in image.log_while_building or "STEP" in image.log_while_building, image.log_while_building

    def test_it_is_listed(self, server, image):
        items = server.microvms.list_microvm_images(nameFilter="flask")["items"]
        assert image.arn in [found["imageArn"] for found in items]


class Test3AMicrovmStartsFromTheSnapshot:
    """SPEC 5.4."""

    def test_it_is_pending_then_running(self, server, image, run):
        microvm = run(wait=False, idlePolicy=idle_policy())
        said = microvm.description
        assert said["state"] == "PENDING"
        assert re.fullmatch(f"microvm-{UUID}", said["microvmId"])
        assert re.fullmatch(rf"{UUID}\.lambda-microvm\.us-east-1\.localhost", said["endpoint"])
        assert said["microvmId"].removeprefix("microvm-") != said["endpoint"].split(".")[0]
        assert said["maximumDurationInSeconds"] == 28800
        assert said["ingressNetworkConnectors"] == ["arn:aws:lambda:us-east-1:aws:network-connector:aws-network-connector:HTTP_INGRESS"]
        found = microvm.wait("RUNNING")
        assert found["imageArn"] == image.arn and found["imageVersion"] == "1.0"
        assert found["idlePolicy"] == idle_policy()

    def test_it_is_listed_with_five_members(self, server, run):
        microvm = run()
        items = server.microvms.list_microvms()["items"]
        listed = next(found for found in items if found["microvmId"] == microvm.id)
        assert set(listed) == {"imageArn", "imageVersion", "microvmId", "startedAt", "state"}


class Test4ItAnswersOnItsEndpoint:
    """SPEC 10. What is refused is in test_refusals.py."""

    def test_the_app_counts_visits_in_memory_and_on_disk(self, run):
        microvm = run()
        for visit in (1, 2, 3):
            answer = microvm.count()
            assert (answer["memory"], answer["disk"]) == (visit, visit)

    def test_headers_of_the_proxy_stay_out_of_the_app(self, run):
        microvm = run()
        answer = microvm.http("/headers", headers={"X-Mine": "kept"})
        assert answer.status == 200
        seen = {name.lower(): value for name, value in answer.json().items()}
        assert seen["host"] == microvm.endpoint
        assert seen["x-mine"] == "kept"
        assert seen["x-amzn-requestid"] == answer.headers["x-amzn-requestid"]
        assert not [name for name in seen if name.startswith("x-aws-proxy-")]


class Test5ThreeMicrovmsShareNothing:
    def test_counters_files_and_endpoints_are_their_own(self, run):
        microvms = [run(wait=False) for _ in range(3)]
        for microvm in microvms:
            microvm.wait("RUNNING")
        assert len({microvm.endpoint for microvm in microvms}) == 3
        for visits, microvm in enumerate(microvms, start=1):
            for visit in range(1, visits + 1):
                answer = microvm.count()
                assert (answer["memory"], answer["disk"]) == (visit, visit)


class Test6IdleMicrovmsSleepAndWake:
    """SPEC 9. The idle times leave room for an answer: a request that is waiting for one, without a byte, keeps nothing awake (9.1)."""

    def test_a_request_wakes_it_and_nothing_is_lost(self, run):
        microvm = run(idlePolicy=idle_policy(idle=10))
        microvm.count()
        assert microvm.processes(), "while it runs, it has a process"
        microvm.wait("SUSPENDED")
        assert not microvm.processes(), "a suspended MicroVM costs no process and no memory"
        answer = microvm.http("/")
        assert answer.status == 200
        counters = answer.json()
        assert (counters["memory"], counters["disk"]) == (2, 2)
        assert microvm.wait("RUNNING")

    def test_traffic_keeps_it_awake(self, run):
        microvm = run(idlePolicy=idle_policy(idle=10))
        process = microvm.processes()
        end = time.monotonic() + 14
        while time.monotonic() < end:
            microvm.count()
            assert microvm.state() == "RUNNING"
        assert microvm.processes() == process

    def test_without_auto_resume_the_request_is_refused(self, run):
        microvm = run(idlePolicy=idle_policy(idle=10, resume=False))
        microvm.count()
        microvm.wait("SUSPENDED")
        answer = microvm.http("/")
        assert (answer.status, answer.body) == (502, b"")
        assert microvm.state() == "SUSPENDED"
        microvm.client.resume_microvm(microvmIdentifier=microvm.id)
        microvm.wait("RUNNING")
        answer = microvm.count()
        assert (answer["memory"], answer["disk"]) == (2, 2)

    def test_many_requests_at_once_wake_it_once(self, run):
        from concurrent.futures import ThreadPoolExecutor

        microvm = run(idlePolicy=idle_policy(idle=600))
        microvm.count()
        microvm.client.suspend_microvm(microvmIdentifier=microvm.id)
        microvm.wait("SUSPENDED")
        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(lambda _: microvm.http("/"), range(6)))
        assert [answer.status for answer in answers] == [200] * 6
        assert sorted(answer.json()["memory"] for answer in answers) == [2, 3, 4, 5, 6, 7]


class Test7ByHandAndByTheClock:
    """SPEC 5.4, 9.2."""

    def test_suspend_and_resume_by_hand_again_and_again(self, run):
        microvm = run()
        for visit in (1, 2, 3):
            assert microvm.count()["memory"] == visit
            assert microvm.client.suspend_microvm(microvmIdentifier=microvm.id)["ResponseMetadata"]["HTTPStatusCode"] == 200
            microvm.wait("SUSPENDED")
            assert microvm.client.resume_microvm(microvmIdentifier=microvm.id)["ResponseMetadata"]["HTTPStatusCode"] == 200
            microvm.wait("RUNNING")
        assert microvm.count()["disk"] == 4

    def test_suspending_twice_and_resuming_twice_is_accepted(self, run):
        microvm = run()
        for _ in range(2):
            microvm.client.suspend_microvm(microvmIdentifier=microvm.id)
            microvm.wait("SUSPENDED")
        for _ in range(2):
            microvm.client.resume_microvm(microvmIdentifier=microvm.id)
            microvm.wait("RUNNING")

    def test_a_token_can_be_made_while_it_is_suspended(self, run):
        microvm = run(idlePolicy=idle_policy())
        microvm.client.suspend_microvm(microvmIdentifier=microvm.id)
        microvm.wait("SUSPENDED")
        assert microvm.http("/").status == 200

    def test_suspended_for_too_long_is_terminated(self, run):
        microvm = run(idlePolicy=idle_policy(suspended=2))
        microvm.client.suspend_microvm(microvmIdentifier=microvm.id)
        found = microvm.wait("TERMINATED")
        assert found["terminatedAt"]

    def test_an_idle_microvm_with_no_suspended_time_is_terminated(self, run):
        microvm = run(idlePolicy=idle_policy(idle=2, suspended=0))
        microvm.wait("TERMINATED")

    def test_the_maximum_duration_ends_it(self, run):
        microvm = run(maximumDurationInSeconds=5)
        found = microvm.wait("TERMINATED")
        assert found["stateReason"] == "MicroVM exceeded maximum lifetime."
        assert microvm.http("/", token="x.y.z").status == 403

    def test_the_maximum_duration_ends_a_suspended_one_too(self, run):
        microvm = run(maximumDurationInSeconds=5)
        microvm.client.suspend_microvm(microvmIdentifier=microvm.id)
        microvm.wait("SUSPENDED")
        assert microvm.wait("TERMINATED")["stateReason"] == "MicroVM exceeded maximum lifetime."

    def test_terminating_twice_is_accepted_and_the_rest_is_not(self, server, run):
        microvm = run()
        token = microvm.token()
        for _ in range(2):
            answer = microvm.client.terminate_microvm(microvmIdentifier=microvm.id)
            assert answer["ResponseMetadata"]["HTTPStatusCode"] == 200
        found = microvm.wait("TERMINATED")
        assert found["stateReason"] == "Success."
        assert not microvm.processes()
        assert not (server.data_dir / "microvms" / microvm.id).exists(), "a terminated MicroVM leaves no files"
        assert microvm.http("/", token=token).status == 502
        refusal = f"The MicroVM {microvm.id} has been terminated and its state cannot be changed."
        for call in (microvm.client.suspend_microvm, microvm.client.resume_microvm):
            assert error_of(call, microvmIdentifier=microvm.id) == ("ValidationException", refusal, 400)
        assert error_of(
            microvm.client.create_microvm_auth_token,
            microvmIdentifier=microvm.id,
            expirationInMinutes=5,
            allowedPorts=[{"port": FLASK_PORT}],
        ) == ("ValidationException", refusal, 400)


class Test8TheImageIsDeleted:
    """SPEC 2.1, 3.3. That a stopped server leaves nothing is in test_server.py."""

    def test_not_while_it_has_microvms_and_then_without_a_trace(self, server):
        uri = support.upload(server, "flask-hello.zip", support.zip_directory(FLASK_HELLO))
        arn = support.create_image(server, "to-be-deleted", uri)["imageArn"]
        client = server.microvms
        support.wait_image(server, arn, "CREATED")

        before = set((server.data_dir / "images").iterdir())
        microvm = support.run_microvm(server, arn)
        microvm.wait("RUNNING")
        refusal = ("ValidationException", "Cannot delete microvm image with running microvms.", 400)
        assert error_of(client.delete_microvm_image, imageIdentifier=arn) == refusal
        microvm.terminate()
        microvm.wait("TERMINATED")

        answer = client.delete_microvm_image(imageIdentifier=arn)
        assert (answer["imageIdentifier"], answer["state"]) == (arn, "DELETING")

        def gone():
            try:
                return client.get_microvm_image(imageIdentifier=arn)["state"] not in ("DELETING",)
            except client.exceptions.ResourceNotFoundException:
                return True

        assert support.eventually(gone, "the image to be gone")
        assert error_of(client.get_microvm_image, imageIdentifier=arn) == (
            "ResourceNotFoundException",
            f"MicroVMImage not found for MicroVMImageID: {arn}",
            404,
        )
        assert len(set((server.data_dir / "images").iterdir())) == len(before) - 1, "its snapshot is gone from the disk"
