//! Short forms that people may use for ids and ARNs.

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

use crate::connect::Connect;

const ID_PREFIX: &str = "microvm-";

/// What stays as it is in a segment of a path and in a value of a query: the unreserved characters of RFC 3986, and an ARN's colons.
const ESCAPED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~').remove(b':');

/// A short form that fits no MicroVM, or several.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// none begins so
    #[error("no MicroVM has an id that begins with `{0}`: see `hearth ps -a` for those there are")]
    Unknown(String),
    /// several begin so
    #[error("`{prefix}` is the beginning of {} ids, write more of the one that is meant:\n  {}", ids.len(), ids.join("\n  "))]
    Ambiguous {
        /// What was written.
        prefix: String,
        /// What it fits.
        ids: Vec<String>,
    },
}

/// Finds the one id that begins with `prefix`, with or without `microvm-`. `live` ones win over those that are over.
pub fn resolve<'a>(prefix: &str, ids: impl Iterator<Item = (&'a str, bool)>) -> Result<&'a str, NameError> {
    let fits = |id: &str| id.starts_with(prefix) || id.strip_prefix(ID_PREFIX).is_some_and(|id| id.starts_with(prefix));
    let (live, over): (Vec<_>, Vec<_>) = ids.filter(|(id, _)| !prefix.is_empty() && fits(id)).partition(|(_, live)| *live);
    let candidates = if live.is_empty() { over } else { live };
    match candidates.as_slice() {
        [] => Err(NameError::Unknown(prefix.to_owned())),
        [(id, _)] => Ok(id),
        several => Err(NameError::Ambiguous { prefix: prefix.to_owned(), ids: several.iter().map(|(id, _)| (*id).to_owned()).collect() }),
    }
}

/// The ARN of an image, given its name or its ARN.
pub fn image_arn(connect: &Connect, image: &str) -> String {
    if image.starts_with("arn:") {
        image.to_owned()
    } else {
        format!("arn:aws:lambda:{}:{}:microvm-image:{image}", connect.region, connect.account)
    }
}

/// The ARN of one of the service's own connectors.
pub fn managed_connector(connect: &Connect, name: &str) -> String {
    format!("arn:aws:lambda:{}:aws:network-connector:aws-network-connector:{name}", connect.region)
}

/// The name at the end of an image's ARN.
pub fn image_name(arn: &str) -> &str {
    arn.rsplit(':').next().unwrap_or(arn)
}

/// Escapes a text for a segment of a path or a value of a query.
pub fn escape(text: &str) -> String {
    utf8_percent_encode(text, ESCAPED).to_string()
}

/// A directory's name made into one that an image may have: 1–64 characters of `[a-zA-Z0-9-_]`.
pub fn image_name_of(dir: &std::path::Path) -> Option<String> {
    let name = dir.file_name()?.to_string_lossy();
    let allowed = |c: char| if c.is_ascii_alphanumeric() || c == '-' || c == '_' { c } else { '-' };
    let name: String = name.chars().map(allowed).take(64).collect();
    let name = name.trim_matches('-');
    (!name.is_empty()).then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connect::tests::example;

    const IDS: [(&str, bool); 4] = [("microvm-aa11", true), ("microvm-aa22", false), ("microvm-bb11", true), ("microvm-bb12", true)];

    #[test]
    fn a_beginning_that_fits_one_is_enough_with_or_without_microvm() {
        assert_eq!(resolve("microvm-aa22", IDS.into_iter()), Ok("microvm-aa22"));
        assert_eq!(resolve("bb12", IDS.into_iter()), Ok("microvm-bb12"));
    }

    #[test]
    fn those_that_are_over_do_not_make_a_beginning_ambiguous() {
        assert_eq!(resolve("aa", IDS.into_iter()), Ok("microvm-aa11"));
    }

    #[test]
    fn a_beginning_that_fits_several_is_refused_with_all_of_them() {
        let error = resolve("bb", IDS.into_iter()).unwrap_err();
        assert!(error.to_string().contains("microvm-bb11\n  microvm-bb12"), "{error}");
        assert!(matches!(resolve("microvm-", IDS.into_iter()), Err(NameError::Ambiguous { .. })));
    }

    #[test]
    fn a_beginning_that_fits_none_is_refused() {
        assert!(matches!(resolve("cc", IDS.into_iter()), Err(NameError::Unknown(_))));
        assert!(matches!(resolve("", IDS.into_iter()), Err(NameError::Unknown(_))));
    }

    #[test]
    fn images_may_be_named_or_given_by_arn() {
        let arn = "arn:aws:lambda:us-east-1:000000000000:microvm-image:demo";
        assert_eq!(image_arn(&example(), "demo"), arn);
        assert_eq!(image_arn(&example(), arn), arn);
        assert_eq!(image_name(arn), "demo");
    }

    #[test]
    fn what_would_end_a_segment_is_escaped() {
        assert_eq!(escape("a/b?c&d:e"), "a%2Fb%3Fc%26d:e");
    }

    #[test]
    fn a_directory_s_name_becomes_an_image_s() {
        assert_eq!(image_name_of("/x/flask hello.d".as_ref()).as_deref(), Some("flask-hello-d"));
        assert_eq!(image_name_of("/".as_ref()), None);
        assert_eq!(image_name_of("/x/…".as_ref()), None);
    }
}
