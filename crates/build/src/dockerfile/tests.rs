use super::*;

fn recipe(text: &str) -> Recipe {
    read(text, "amd64", Path::new("/nonexistent")).unwrap()
}

fn problem(text: &str) -> String {
    read(text, "amd64", Path::new("/nonexistent")).unwrap_err().to_string()
}

#[test]
fn read_plain_dockerfile_is_unchanged() {
    let text = "# a comment\nFROM debian AS one\nRUN a \\\n  # inside\n  b\nFROM one\nCOPY --from=one --chmod=755 a b\nCMD [\"a\"]";
    assert_eq!(recipe(text), Recipe { text: text.to_owned(), images: vec!["debian".to_owned()], notes: Vec::new() });
}

#[test]
fn read_images_expands_arguments_with_defaults() {
    let text = "ARG TAG=al2023-minimal REPO=public.ecr.aws/lambda\nARG BASE=\"${REPO}/microvms\"\nFROM $BASE:${TAG} AS a\nFROM ${NONE:-busybox}:1\n\
                FROM ${UNKNOWN}\nCOPY --from=alpine:3 /a /b\nCOPY --from=0 /a /b\nRUN --mount=type=bind,from=tools,target=/t true\nFROM scratch";
    assert_eq!(recipe(text).images, ["public.ecr.aws/lambda/microvms:al2023-minimal", "busybox:1", "alpine:3", "tools"]);
}

#[test]
fn read_syntax_of_buildkit_is_dropped_and_others_are_refused() {
    for syntax in ["# syntax=docker/dockerfile:1", "#syntax = docker.io/docker/dockerfile:1.7-labs", "# Syntax=docker/dockerfile@sha256:ab"]
    {
        assert_eq!(recipe(&format!("{syntax}\nFROM a\n")).text, "#\nFROM a\n", "{syntax}");
    }
    // Not a directive: something else came first.
    assert_eq!(recipe("\n# syntax=x/y\nFROM a").text, "\n# syntax=x/y\nFROM a");
    assert_eq!(
        problem("# check=skip=all\n# syntax=example/front:1\nFROM a"),
        "Dockerfile line 2: the frontend example/front:1 cannot be used: builds understand docker/dockerfile only"
    );
}

#[test]
fn read_frontend_in_other_forms_is_refused() {
    let shebang = problem("#!/usr/bin/env docker\n# check=skip=all\n# syntax=example/front:1\nFROM a");
    assert!(shebang.starts_with("Dockerfile line 3: the frontend example/front:1 cannot be used"), "{shebang}");
    assert_eq!(recipe("#!/usr/bin/env docker\n# syntax=docker/dockerfile:1\nFROM a").text, "#!/usr/bin/env docker\n#\nFROM a");
    for (text, line, sign) in [
        ("// syntax=example/front:1\nFROM a", 1, "//"),
        ("//check=a\n//syntax=example/front:1\nFROM a", 1, "//"),
        ("#!/bin/x\n// syntax=example/front:1\nFROM a", 2, "//"),
        ("\u{feff}// syntax=example/front:1", 1, "//"),
        ("{\"syntax\": \"example/front:1\"}", 1, "{"),
        ("\n  {\"a\": [], \"Syntax\": \"example/front:1\"}\n", 2, "{"),
    ] {
        assert!(problem(text).starts_with(&format!("Dockerfile line {line}: a Dockerfile does not begin with {sign}: ")), "{text}");
    }
}

#[test]
fn read_arguments_that_double_are_not_followed() {
    let mut text = "ARG A0=abcdefghij\n".to_owned();
    for number in 0..60 {
        text.push_str(&format!("ARG A{}=$A{number}${{A{number}}}\n", number + 1));
    }
    text.push_str("FROM $A1\nFROM $A60\nFROM b\n");
    assert_eq!(recipe(&text).images, ["abcdefghijabcdefghij", "b"]);
}

#[test]
fn read_many_stages_and_images_takes_a_moment() {
    let text: String = (0..40_000).map(|number| format!("FROM a{number} AS s{number}\n")).collect();
    let started = std::time::Instant::now();
    assert!(recipe(&text).images.len() <= 1000);
    assert!(started.elapsed() < std::time::Duration::from_secs(20));
}

#[test]
fn read_parents_behind_a_link_asks_nothing_of_the_host() {
    let dir = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink("/", dir.path().join("up")).unwrap();
    let answers =
        ["up/etc/passwd", "up/no/such"].map(|path| read(&format!("FROM a\nCOPY --parents {path} /x/"), "amd64", dir.path()).is_ok());
    assert_eq!(answers, [true, true], "whether a file of the host exists makes no difference");
}

#[test]
fn read_heredoc_bodies_are_not_instructions() {
    let text = "FROM a\nRUN cat <<EOF > x && cat <<-'TWO'\nFROM hidden\nRUN --network=host\nEOF\n\tFROM hidden\n\tTWO\nCOPY <<\"X\" <<Y /d/\nFROM hidden\nX\n\
                FROM hidden\nY\nRUN echo a << b <<<EOF\nFROM b\n";
    let recipe = recipe(text);
    // `<< b` and `<<<EOF` are none.
    assert_eq!(recipe.images, ["a", "b"]);
    assert_eq!(recipe.text, text);
}

#[test]
fn read_escape_directive_changes_continuation() {
    let text = "# escape=`\nFROM a\nRUN dir c:\\\nFROM b\nRUN x `\n FROM c\n";
    assert_eq!(recipe(text).images, ["a", "b"]);
}

#[test]
fn read_permissions_in_octal_with_prefix_are_rewritten() {
    assert_eq!(recipe("FROM a\nCOPY --chmod=0o755 --chown=1:1 x y").text, "FROM a\nCOPY --chmod=755 --chown=1:1 x y");
    assert_eq!(recipe("FROM a\nADD \\\n  --chmod=0o0644 \\\n x y").text, "FROM a\nADD \\\n  --chmod=0644 \\\n x y");
    assert_eq!(recipe("FROM a\nRUN cp --chmod=0o755 x y").text, "FROM a\nRUN cp --chmod=0o755 x y");
}

#[test]
fn read_foreign_platform_is_replaced_and_noted() {
    let recipe = recipe("FROM --platform=linux/arm64/v8 a\nFROM --platform=$BUILDPLATFORM b\nFROM --platform=linux/amd64 c\n");
    assert_eq!(recipe.text, "FROM --platform=linux/amd64 a\nFROM --platform=$BUILDPLATFORM b\nFROM --platform=linux/amd64 c\n");
    assert_eq!(recipe.notes, ["Dockerfile line 1: built for linux/amd64, which this host runs, instead of linux/arm64/v8."]);
}

#[test]
fn read_security_flags() {
    assert_eq!(recipe("FROM a\nRUN --security=sandbox true").text, "FROM a\nRUN  true");
    assert!(problem("FROM a\nRUN --security=insecure true").starts_with("Dockerfile line 2: RUN --security=insecure is not permitted"));
    assert!(problem("FROM a\n\nRUN --network=host \\\n true").starts_with("Dockerfile line 3: RUN --network=host is not permitted"));
    assert_eq!(recipe("FROM a\nRUN echo --security=insecure").text, "FROM a\nRUN echo --security=insecure");
}

#[test]
fn read_parents_becomes_exclusion_of_everything_else() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(dir.path().join("src/sub")).unwrap();
    std::fs::write(dir.path().join("src/sub/deep.txt"), "").unwrap();
    let text = |copy: &str| read(&format!("FROM a\n{copy}\nRUN b"), "amd64", dir.path()).map(|recipe| recipe.text);
    assert_eq!(
        text("COPY --parents src/sub/deep.txt /www/").unwrap(),
        "FROM a\nCOPY --exclude=** --exclude=!src/sub/deep.txt [\".\",\"/www/\"]\nRUN b"
    );
    assert_eq!(
        text("COPY --chown=1 --parents \\\n ./src/./sub/*.txt src/sub/ x").unwrap(),
        "FROM a\nCOPY --exclude=** --exclude=!src/sub --chown=1 [\".\",\"x/\"]\nCOPY --exclude=** --exclude=!sub/*.txt --chown=1 [\"./src\",\"x/\"]\nRUN b"
    );
    assert_eq!(
        text("COPY --parents [\"src/a b\", \"/x y\"]").unwrap_err().to_string(),
        "Dockerfile line 2: COPY --parents: \"src/a b\" is not in the archive"
    );
    assert!(
        text("COPY --parents --from=stage /opt/./lib /usr/")
            .unwrap()
            .contains("--exclude=** --exclude=!lib --from=stage [\"/opt\",\"/usr/\"]")
    );
    assert!(text("COPY --parents <<EOF /x\nEOF").unwrap_err().to_string().contains("here-document"));
}

proptest::proptest! {
    /// Any text is read without a panic, and what needs no change keeps every line.
    #[test]
    fn read_any_text_keeps_lines(text in "(FROM a|RUN b|COPY --parents x y|<<EOF|EOF|[\\\\\"' #=é`$-]|\n){0,30}") {
        if let Ok(recipe) = read(&text, "amd64", Path::new("/")) {
            proptest::prop_assert!(recipe.text.matches('\n').count() >= text.matches('\n').count());
        }
    }
}
