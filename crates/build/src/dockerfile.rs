//! What Hearth reads of a Dockerfile before BuildKit does.
//!
//! BuildKit decides what a Dockerfile means. A few things are settled before: the images that it begins with, so that the managed base can
//! be provided; foreign platforms; and syntax that is newer than the BuildKit at hand, which is written in its older words. Lines keep
//! their numbers, because BuildKit's errors name them.

mod edit;
mod scan;

use std::{
    collections::{BTreeMap, HashSet},
    path::Path,
};

use self::scan::{Directives, Instruction};

/// Frontends that are BuildKit's own, with or without a registry.
const OWN_FRONTENDS: [&str; 2] = ["docker/dockerfile", "docker/dockerfile-upstream"];

/// Longest value that is followed, in bytes.
const MAX_EXPANDED: usize = 4 << 10;
/// Most images that are looked at: each one of the managed base's is looked for.
const MAX_IMAGES: usize = 1000;

/// A Dockerfile that cannot be built here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("Dockerfile line {line}: {problem}")]
pub(crate) struct DockerfileError {
    line: usize,
    problem: Problem,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
enum Problem {
    #[error("the frontend {0} cannot be used: builds understand docker/dockerfile only")]
    Frontend(String),
    #[error("a Dockerfile does not begin with {0}: builds understand docker/dockerfile only")]
    Foreign(&'static str),
    #[error("RUN --security=insecure is not permitted: a step has no rights over its host")]
    Insecure,
    #[error("RUN --network=host is not permitted: a step has no host to share; leave the flag out to use the image's own network")]
    HostNetwork,
    #[error("{0} --parents cannot be combined with a here-document")]
    ParentsOfHeredoc(String),
    #[error("{instruction} --parents: \"{path}\" is not in the archive")]
    Missing { instruction: String, path: String },
}

/// A Dockerfile as BuildKit gets it.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Recipe {
    pub(crate) text: String,
    /// Images that it names, stages and `scratch` left out, each once. Names with variables that only the build knows are not among them.
    pub(crate) images: Vec<String>,
    /// What was changed in a way that its author should know of.
    pub(crate) notes: Vec<String>,
}

/// Reads a Dockerfile. `architecture` is the host's as images name it (`amd64`), `context` the directory that `COPY` copies from.
pub(crate) fn read(text: &str, architecture: &str, context: &Path) -> Result<Recipe, DockerfileError> {
    if let Some((line, sign)) = scan::foreign(text) {
        return Err(DockerfileError { line, problem: Problem::Foreign(sign) });
    }
    let (directives, instructions) = scan::scan(text);
    let mut reader = Reader {
        architecture,
        context,
        edits: Vec::new(),
        recipe: Recipe::default(),
        globals: BTreeMap::new(),
        has_stages: false,
        stages: HashSet::new(),
    };
    reader.globals.insert("TARGETARCH".to_owned(), architecture.to_owned());
    reader.globals.insert("TARGETPLATFORM".to_owned(), format!("linux/{architecture}"));
    reader.directives(&directives)?;
    for instruction in &instructions {
        reader.instruction(instruction)?;
    }
    let Reader { edits, mut recipe, .. } = reader;
    recipe.text = edit::apply(text, edits);
    Ok(recipe)
}

struct Reader<'a> {
    architecture: &'a str,
    context: &'a Path,
    edits: Vec<edit::Edit>,
    recipe: Recipe,
    /// Values of the ARGs before the first FROM, the only ones that an image's name may refer to.
    globals: BTreeMap<String, String>,
    has_stages: bool,
    /// Their names, in lower case.
    stages: HashSet<String>,
}

impl Reader<'_> {
    fn directives(&mut self, directives: &Directives) -> Result<(), DockerfileError> {
        let Some(syntax) = &directives.syntax else { return Ok(()) };
        let name = syntax.value.strip_prefix("docker.io/").unwrap_or(&syntax.value);
        let name = name.split(['@', ':']).next().unwrap_or(name);
        if !OWN_FRONTENDS.contains(&name) {
            return Err(DockerfileError { line: syntax.line, problem: Problem::Frontend(syntax.value.clone()) });
        }
        // BuildKit would fetch that frontend from its registry. The one that is built in understands the same.
        self.edits.push(edit::Edit { span: syntax.span.clone(), text: "#".to_owned() });
        Ok(())
    }

    fn instruction(&mut self, instruction: &Instruction) -> Result<(), DockerfileError> {
        match instruction.name.as_str() {
            "ARG" if !self.has_stages => self.global_arguments(instruction),
            "FROM" => self.from(instruction),
            "COPY" | "ADD" => self.copy(instruction)?,
            "RUN" => self.run(instruction)?,
            _ => {}
        }
        Ok(())
    }

    fn global_arguments(&mut self, instruction: &Instruction) {
        for word in instruction.arguments() {
            let Some((name, value)) = word.text.split_once('=') else { continue };
            if let Some(value) = self.expand(&scan::unquote(value)) {
                self.globals.insert(name.to_owned(), value);
            }
        }
    }

    fn from(&mut self, instruction: &Instruction) {
        for flag in instruction.flags() {
            let Some(platform) = flag.text.strip_prefix("--platform=") else { continue };
            let wanted = scan::unquote(platform);
            if let Some(architecture) = architecture_of(&wanted)
                && architecture != self.architecture
            {
                let host = format!("linux/{}", self.architecture);
                self.recipe
                    .notes
                    .push(format!("Dockerfile line {}: built for {host}, which this host runs, instead of {wanted}.", instruction.line));
                self.edits.push(edit::Edit { span: flag.span.clone(), text: format!("--platform={host}") });
            }
        }
        let arguments = instruction.arguments();
        if let Some(image) = arguments.first() {
            self.names_image(&scan::unquote(&image.text));
        }
        self.has_stages = true;
        if let [_, word, name] = arguments
            && word.text.eq_ignore_ascii_case("as")
        {
            self.stages.insert(name.text.to_ascii_lowercase());
        }
    }

    fn copy(&mut self, instruction: &Instruction) -> Result<(), DockerfileError> {
        for flag in instruction.flags() {
            if let Some(image) = flag.text.strip_prefix("--from=") {
                self.names_image(&scan::unquote(image));
            } else if let Some(octal) = flag.text.strip_prefix("--chmod=0o").or_else(|| flag.text.strip_prefix("--chmod=0O")) {
                self.edits.push(edit::Edit { span: flag.span.clone(), text: format!("--chmod={octal}") });
            }
        }
        if instruction.flags().iter().any(|flag| matches!(flag.text.as_str(), "--parents" | "--parents=true")) {
            let error = |problem| DockerfileError { line: instruction.line, problem };
            self.edits.push(edit::parents(instruction, self.context).map_err(error)?);
        } else if let Some(flag) = instruction.flags().iter().find(|flag| flag.text == "--parents=false") {
            self.edits.push(edit::Edit { span: flag.span.clone(), text: String::new() });
        }
        Ok(())
    }

    fn run(&mut self, instruction: &Instruction) -> Result<(), DockerfileError> {
        for flag in instruction.flags() {
            let problem = match flag.text.as_str() {
                "--security=insecure" => Problem::Insecure,
                "--network=host" => Problem::HostNetwork,
                "--security=sandbox" => {
                    // What every step is anyway.
                    self.edits.push(edit::Edit { span: flag.span.clone(), text: String::new() });
                    continue;
                }
                mount => {
                    if let Some(options) = mount.strip_prefix("--mount=")
                        && let Some(image) = options.split(',').find_map(|option| option.strip_prefix("from="))
                    {
                        self.names_image(&scan::unquote(image));
                    }
                    continue;
                }
            };
            return Err(DockerfileError { line: instruction.line, problem });
        }
        Ok(())
    }

    fn names_image(&mut self, name: &str) {
        let Some(name) = self.expand(name) else { return };
        let is_stage = self.stages.contains(&name.to_ascii_lowercase());
        let is_number = name.bytes().all(|byte| byte.is_ascii_digit());
        if !is_stage && !is_number && name != "scratch" && self.recipe.images.len() < MAX_IMAGES && !self.recipe.images.contains(&name) {
            self.recipe.images.push(name);
        }
    }

    /// Replaces `$NAME`, `${NAME}`, `${NAME:-word}`, `${NAME-word}` and `${NAME:+word}`. `None` for other forms, if a value is unknown, and if
    /// the result is longer than an image's name can be: values that are made of values double with each line.
    fn expand(&self, text: &str) -> Option<String> {
        let mut expanded = String::new();
        let mut rest = text;
        while let Some(at) = rest.find('$') {
            expanded.push_str(&rest[..at]);
            rest = &rest[at + 1..];
            if let Some(braced) = rest.strip_prefix('{') {
                let end = braced.find('}')?;
                expanded.push_str(&self.parameter(&braced[..end])?);
                rest = &braced[end + 1..];
            } else {
                let end = rest.find(|character: char| !character.is_ascii_alphanumeric() && character != '_').unwrap_or(rest.len());
                expanded.push_str(self.globals.get(&rest[..end])?);
                rest = &rest[end..];
            }
            if expanded.len() > MAX_EXPANDED {
                return None;
            }
        }
        expanded.push_str(rest);
        (expanded.len() <= MAX_EXPANDED).then_some(expanded)
    }

    fn parameter(&self, parameter: &str) -> Option<String> {
        let end = parameter.find(|character: char| !character.is_ascii_alphanumeric() && character != '_').unwrap_or(parameter.len());
        let (name, form) = parameter.split_at(end);
        let value = self.globals.get(name);
        let filled = value.filter(|value| !value.is_empty());
        match form {
            "" => value.cloned(),
            _ if form.starts_with(":-") => Some(filled.cloned().unwrap_or_else(|| form[2..].to_owned())),
            _ if form.starts_with('-') => Some(value.cloned().unwrap_or_else(|| form[1..].to_owned())),
            _ if form.starts_with(":+") => Some(filled.map(|_| form[2..].to_owned()).unwrap_or_default()),
            _ => None,
        }
    }
}

/// The architecture of a platform (`linux/arm64/v8`) as images name it; `None` if there is a variable in it, or an unknown word.
fn architecture_of(platform: &str) -> Option<&'static str> {
    let platform = platform.to_ascii_lowercase();
    let architecture = platform.strip_prefix("linux/").unwrap_or(&platform);
    match architecture.split('/').next() {
        Some("amd64" | "x86_64" | "x86-64") => Some("amd64"),
        Some("arm64" | "aarch64") => Some("arm64"),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
