//! Dockerfiles as people write them, and what must be in the file system that comes out.

use super::*;

/// A Dockerfile behind `FROM` the base image, files of its context, and files of the result.
struct Case {
    name: &'static str,
    dockerfile: &'static str,
    context: &'static [(&'static str, &'static str)],
    result: &'static [(&'static str, &'static str)],
}

const TREE: &[(&str, &str)] =
    &[("src/index.html", "hi"), ("src/skip.log", "no"), ("src/sub/deep.txt", "deep"), ("src/run.sh", "#!/bin/sh")];

const CASES: &[Case] = &[
    Case {
        name: "heredoc-in-a-pipeline-keeps-comments-and-quotes",
        dockerfile: "RUN cat > /start.sh <<'EOS'\n#!/bin/sh\n# a comment line\necho \"home is $HOME and it's fine\"\nEOS\n",
        context: &[],
        result: &[("/start.sh", "#!/bin/sh\n# a comment line\necho \"home is $HOME and it's fine\"\n")],
    },
    Case {
        name: "heredoc-of-run-is-a-script",
        dockerfile: "RUN <<EOF\nset -e\necho hi > /a\nEOF\nRUN <<EOF\n#!/bin/sh -e\necho shebang > /b\nEOF\n",
        context: &[],
        result: &[("/a", "hi\n"), ("/b", "shebang\n")],
    },
    Case {
        name: "heredoc-of-copy-with-two-files-tabs-and-quotes",
        dockerfile: "ARG WHO=world\nCOPY <<-\"ONE\" <<TWO /www/\n\tfirst $WHO\n\tONE\nsecond $WHO\nTWO\n",
        context: &[],
        result: &[("/www/ONE", "first $WHO\n"), ("/www/TWO", "second world\n")],
    },
    Case {
        name: "heredoc-with-instructions-in-it-is-text",
        dockerfile: "RUN cat > /text <<'EOS'\nUSER nobody\nENV INJECTED=1\nFROM nothing\nEOS\nRUN echo \"${INJECTED-unset}\" > /env\n",
        context: &[],
        result: &[("/text", "USER nobody\nENV INJECTED=1\nFROM nothing\n"), ("/env", "unset\n")],
    },
    Case {
        name: "copy-link-and-exclude",
        dockerfile: "COPY --link --exclude=*.log src /www\nADD --link src/index.html /added\nRUN ls /www > /list\n",
        context: TREE,
        result: &[("/list", "index.html\nrun.sh\nsub\n"), ("/added", "hi")],
    },
    Case {
        name: "copy-parents",
        dockerfile: "COPY --parents src/sub/deep.txt src/*.html /www/\nCOPY --parents src/./sub /pivot/\nADD --parents --exclude=**/*.log src /all/\n\
                     RUN ls /www/src /pivot /all/src > /list\n",
        context: TREE,
        result: &[
            ("/www/src/sub/deep.txt", "deep"),
            ("/pivot/sub/deep.txt", "deep"),
            ("/list", "/all/src:\nindex.html\nrun.sh\nsub\n\n/pivot:\nsub\n\n/www/src:\nindex.html\nsub\n"),
        ],
    },
    Case {
        name: "copy-permissions-in-every-notation",
        dockerfile: "COPY --chmod=0o750 src/index.html /a\nCOPY --chmod=u=rw,go=r src/index.html /b\nCOPY --chmod=+x src/index.html /c\n\
                     ADD --chmod=a+rX,go-w --chown=3:4 src /d\nARG M=600\nCOPY --chmod=$M src/index.html /e\n\
                     RUN stat -c '%a %u:%g' /a /b /c /d /d/sub /e > /list\n",
        context: TREE,
        result: &[("/list", "750 0:0\n644 0:0\n755 0:0\n755 3:4\n755 3:4\n600 0:0\n")],
    },
    Case {
        name: "bind-cache-tmpfs-and-secret-mounts",
        dockerfile: "RUN --mount=type=bind,source=src,target=/s cp /s/index.html /bound\n\
                     RUN --mount=type=tmpfs,target=/t,size=1m --mount=type=cache,target=/c echo x > /t/x; echo y > /c/y; cp /c/y /cached\n\
                     RUN --mount=type=secret,id=none,env=NONE echo \"${NONE:-unset}\" > /secret\nRUN --network=none true\n\
                     RUN --security=sandbox true\n",
        context: TREE,
        result: &[("/bound", "hi"), ("/cached", "y\n"), ("/secret", "unset\n")],
    },
    Case {
        name: "variables-with-patterns-and-platforms",
        dockerfile: "ARG V=1.2.3-rc1\nENV SHORT=${V%%-*} TAIL=${V#*.} SWAPPED=${V/rc/beta}\nARG TARGETARCH TARGETOS\n\
                     RUN echo $SHORT $TAIL $SWAPPED $TARGETOS > /v\nHEALTHCHECK --start-interval=1s CMD true\n",
        context: &[],
        result: &[("/v", "1.2.3 2.3-rc1 1.2.3-beta1 linux\n")],
    },
    Case {
        name: "stages-by-name-number-and-platform",
        dockerfile: "RUN echo zero > /zero\nFROM --platform=$BUILDPLATFORM registry.invalid/base AS second\nRUN echo second > /second\n\
                     FROM --platform=linux/arm64 registry.invalid/base:latest\nCOPY --from=0 /zero /zero\nCOPY --from=second /second /second\n\
                     RUN --mount=from=second,target=/m cp /m/second /mounted\n",
        context: &[],
        result: &[("/zero", "zero\n"), ("/second", "second\n"), ("/mounted", "second\n")],
    },
    Case {
        name: "triggers-are-for-images-built-from-this-one",
        dockerfile: "RUN echo mine > /mine\nONBUILD COPY /etc/hostname /mine\nONBUILD RUN echo changed > /mine\nONBUILD ADD package.json /\n",
        context: &[],
        result: &[("/mine", "mine\n")],
    },
    Case {
        name: "scratch-has-a-directory-for-temporary-files",
        dockerfile: "RUN true\nFROM scratch\nCOPY --from=0 / /\nRUN echo t > /tmp/t && cp /tmp/t /t\n",
        context: &[],
        result: &[("/t", "t\n")],
    },
    Case {
        name: "shell-and-continued-lines",
        dockerfile: "SHELL [\"/bin/sh\", \"-ec\"]\nRUN echo `echo tick` \\\n  # a comment\n\n  tock > /clock\n",
        context: &[],
        result: &[("/clock", "tick tock\n")],
    },
];

#[tokio::test]
async fn build_of_each_dockerfile_has_the_right_content() {
    let Some(fixture) = fixture().await else { return };
    for case in CASES {
        let dockerfile = format!("# syntax=docker/dockerfile:1.7-labs\nFROM {BASE}\n{}CMD [\"/bin/sh\"]\n", case.dockerfile);
        let files: Vec<(&str, &str)> = [("Dockerfile", dockerfile.as_str())].into_iter().chain(case.context.iter().copied()).collect();
        let outcome = fixture.build_with(case.name, &files, |_| {}).await;
        assert!(outcome.result.is_ok(), "{}: {:?} {:#?}", case.name, outcome.result, outcome.log);
        for (path, content) in case.result {
            assert_eq!(fixture.debugfs(case.name, &format!("cat {path}")), *content, "{}: {path}\n{:#?}", case.name, outcome.log);
        }
    }
}

/// What is refused, and the words that say why.
const REFUSED: &[(&str, &str, &str)] = &[
    ("frontend", "# syntax=example/other:1\nFROM scratch\n", "Dockerfile line 1: the frontend example/other:1"),
    ("insecure", "FROM scratch\nRUN --security=insecure true\n", "Dockerfile line 2: RUN --security=insecure"),
    ("host-network", "FROM scratch\n\nRUN --network=host true\n", "Dockerfile line 3: RUN --network=host"),
    ("unknown-flag", "FROM scratch\nCOPY --nonsense a b\n", "line 2: unknown flag: --nonsense"),
    (
        "parents-of-nothing",
        "FROM scratch\nCOPY --parents no/such /x/\n",
        "Dockerfile line 2: COPY --parents: \"no/such\" is not in the archive",
    ),
    ("missing-file", "FROM scratch\nCOPY missing /\n", "\"/missing\": not found"),
];

#[tokio::test]
async fn build_of_what_is_refused_names_it_and_no_path_of_the_server() {
    let Some(fixture) = fixture().await else { return };
    for (name, dockerfile, words) in REFUSED {
        let outcome = fixture.build_with(name, &[("Dockerfile", dockerfile)], |_| {}).await;
        let reason = outcome.state_reason();
        assert!(reason.starts_with("The container image build failed.") && reason.contains(words), "{name}: {reason}");
        let dir = fixture.dir.path().to_str().unwrap();
        assert!(outcome.log.iter().chain([&reason]).all(|line| !line.contains(dir)), "{name}: {:#?}", outcome.log);
    }
}

#[tokio::test]
async fn layer_of_a_bind_mount_follows_the_file() {
    let Some(fixture) = fixture().await else { return };
    let dockerfile = format!("FROM {BASE}\nRUN --mount=type=bind,source=version,target=/v cp /v /version\nCMD [\"/bin/sh\"]\n");
    for (name, version, account) in [("one", "one", "1"), ("two", "two", "1"), ("three", "three", "2"), ("again", "one", "1")] {
        let files = [("Dockerfile", dockerfile.as_str()), ("version", version)];
        let outcome = fixture.build_with(name, &files, |request| request.account = account.to_owned()).await;
        assert!(outcome.result.is_ok(), "{:?} {:#?}", outcome.result, outcome.log);
        assert_eq!(fixture.debugfs(name, "cat /version"), version, "{:#?}", outcome.log);
        let cached = outcome.log.iter().any(|line| line.starts_with("CACHED [") && line.contains("RUN"));
        assert_eq!(cached, name == "again", "{name}: {:#?}", outcome.log);
    }
}

#[tokio::test]
async fn stage_from_the_cache_can_be_mounted() {
    let Some(fixture) = fixture().await else { return };
    let dockerfile = format!(
        "FROM {BASE} AS common\nFROM common AS wheels\nRUN mkdir /w && echo wheel > /w/f\nFROM common\nCOPY app /app\n\
         RUN --mount=type=bind,from=wheels,source=/w,target=/w cat /w/f /app > /both\nCMD [\"/bin/sh\"]\n"
    );
    for app in ["one", "two"] {
        let outcome = fixture.build_with(app, &[("Dockerfile", &dockerfile), ("app", app)], |_| {}).await;
        assert!(outcome.result.is_ok(), "{:?} {:#?}", outcome.result, outcome.log);
        assert_eq!(fixture.debugfs(app, "cat /both"), format!("wheel\n{app}"));
    }
}

#[tokio::test]
async fn build_without_cache_runs_every_step_again() {
    let Some(fixture) = fixture().await else { return };
    let dockerfile = format!("FROM {BASE}\nRUN cat /proc/sys/kernel/random/uuid > /id\nCMD [\"/bin/sh\"]");
    let mut ids = Vec::new();
    for (name, no_cache) in [("first", false), ("cached", false), ("anew", true)] {
        let outcome = fixture.build_with(name, &[("Dockerfile", &dockerfile)], |request| request.no_cache = no_cache).await;
        assert!(outcome.result.is_ok(), "{:?} {:#?}", outcome.result, outcome.log);
        ids.push(fixture.debugfs(name, "cat /id"));
    }
    assert_eq!(ids[0], ids[1]);
    assert_ne!(ids[1], ids[2]);
}

#[tokio::test]
async fn image_of_a_hundred_layers_is_flattened() {
    let Some(fixture) = fixture().await else { return };
    let copies: String = (0..100).map(|number| format!("COPY a /layer/{number}\n")).collect();
    let dockerfile = format!("FROM {BASE}\n{copies}CMD [\"/bin/sh\"]\n");
    let outcome = fixture.build_with("layers", &[("Dockerfile", &dockerfile), ("a", "content")], |_| {}).await;
    assert!(outcome.result.is_ok(), "{:?} {:?}", outcome.result, outcome.log.last());
    assert_eq!(fixture.debugfs("layers", "cat /layer/0"), "content");
    assert_eq!(fixture.debugfs("layers", "cat /layer/99"), "content");
}
