//! Bytes of a process's output into lines of text, however the bytes arrive.

/// Longest line, in bytes. Longer ones are cut, so that a process without newlines cannot fill the memory.
const MAX_LINE: usize = 8 << 10;

/// Cuts a stream at `\n`, `\r` (progress bars) and `\r\n`. Bytes that are not UTF-8 are replaced.
#[derive(Debug)]
pub(crate) struct LineSplitter {
    partial: Vec<u8>,
    after_return: bool,
    longest: usize,
}

impl Default for LineSplitter {
    fn default() -> Self {
        Self::with_longest(MAX_LINE)
    }
}

impl LineSplitter {
    /// A splitter that cuts lines of more bytes than this.
    pub(crate) fn with_longest(longest: usize) -> Self {
        Self { partial: Vec::new(), after_return: false, longest }
    }

    /// Takes the next bytes and returns the lines they complete.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Vec<String> {
        let mut lines = Vec::new();
        for &byte in bytes {
            let second_half = byte == b'\n' && self.after_return;
            self.after_return = byte == b'\r';
            match byte {
                _ if second_half => {}
                b'\n' | b'\r' => lines.push(self.take(self.partial.len())),
                _ => {
                    self.partial.push(byte);
                    if self.partial.len() == self.longest {
                        lines.push(self.take(whole_characters(&self.partial)));
                    }
                }
            }
        }
        lines
    }

    /// The last line, if the stream did not end with a newline.
    pub(crate) fn finish(&mut self) -> Option<String> {
        (!self.partial.is_empty()).then(|| self.take(self.partial.len()))
    }

    fn take(&mut self, length: usize) -> String {
        let rest = self.partial.split_off(length);
        let line = std::mem::replace(&mut self.partial, rest);
        String::from_utf8_lossy(&line).into_owned()
    }
}

/// Length of `bytes` without a character that is still incomplete at the end.
fn whole_characters(bytes: &[u8]) -> usize {
    match std::str::from_utf8(bytes) {
        Err(error) if error.error_len().is_none() && error.valid_up_to() > 0 => error.valid_up_to(),
        _ => bytes.len(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn split(chunks: &[&[u8]]) -> Vec<String> {
        let mut splitter = LineSplitter::default();
        let mut lines: Vec<String> = chunks.iter().flat_map(|chunk| splitter.push(chunk)).collect();
        lines.extend(splitter.finish());
        lines
    }

    #[test]
    fn every_kind_of_line_end() {
        assert_eq!(split(&[b"a\nb\r\nc\rd"]), ["a", "b", "c", "d"]);
        assert_eq!(split(&[b"a\r", b"\n\nb\n"]), ["a", "", "b"]);
        assert_eq!(split(&[]), Vec::<String>::new());
    }

    #[test]
    fn characters_cut_by_a_read_or_by_the_limit_stay_whole() {
        assert_eq!(split(&[b"\xc3", b"\xa9\n"]), ["é"]);
        let long = format!("a{}", "é".repeat(MAX_LINE));
        let lines = split(&[long.as_bytes()]);
        assert!(lines.len() > 1);
        assert_eq!(lines.concat(), long);
    }

    #[test]
    fn other_bytes_are_replaced() {
        assert_eq!(split(&[b"a\xffb\n"]), ["a\u{fffd}b"]);
    }

    proptest! {
        #[test]
        fn text_survives_any_chunking(text in "[a-zé\n]{0,200}", cut in 1usize..7) {
            let chunks: Vec<&[u8]> = text.as_bytes().chunks(cut).collect();
            let mut expected: Vec<&str> = text.split('\n').collect();
            if expected.last() == Some(&"") {
                expected.pop();
            }
            prop_assert_eq!(split(&chunks), expected);
        }
    }
}
