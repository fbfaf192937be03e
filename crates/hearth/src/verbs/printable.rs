//! What tenants wrote, made harmless for the operator's terminal: colours stay, every other control sequence is shown instead of obeyed.

use std::io::{self, IsTerminal, Write};

/// Longest colour sequence that is taken for one.
const LONGEST: usize = 32;

/// Standard output: as it is where it is no terminal, else without what would control that.
#[derive(Debug)]
pub struct Printer {
    /// Of the sequence that has begun.
    held: Option<Vec<u8>>,
}

impl Printer {
    pub fn new() -> Self {
        Self { held: io::stdout().is_terminal().then(Vec::new) }
    }

    /// Writes a piece of a log. Sequences may go on in the next piece.
    pub fn print(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut stdout = io::stdout().lock();
        match &mut self.held {
            None => stdout.write_all(bytes)?,
            Some(held) => stdout.write_all(&harmless(held, bytes))?,
        }
        stdout.flush()
    }
}

/// Goes on after `held`, and leaves there what cannot be judged yet.
fn harmless(held: &mut Vec<u8>, bytes: &[u8]) -> Vec<u8> {
    let mut shown = Vec::with_capacity(bytes.len());
    for &byte in bytes {
        match held.as_slice() {
            [] => begin(held, &mut shown, byte),
            // U+0080 to U+009F are control characters of eight bits.
            [0xc2] => {
                held.clear();
                match byte {
                    0x80..=0x9f => shown.extend(format!("\\u{{{byte:x}}}").bytes()),
                    _ => {
                        shown.push(0xc2);
                        begin(held, &mut shown, byte);
                    }
                }
            }
            [0x1b] if byte == b'[' => held.push(byte),
            [0x1b, b'[', ..] if matches!(byte, b'0'..=b'9' | b';' | b':') && held.len() < LONGEST => held.push(byte),
            [0x1b, b'[', ..] if byte == b'm' => {
                shown.append(held);
                shown.push(byte);
            }
            [_, rest @ ..] => {
                shown.extend(b"^[");
                shown.extend(rest);
                held.clear();
                begin(held, &mut shown, byte);
            }
        }
    }
    shown
}

fn begin(held: &mut Vec<u8>, shown: &mut Vec<u8>, byte: u8) {
    match byte {
        0x1b | 0xc2 => held.push(byte),
        b'\t' | b'\n' | b'\r' => shown.push(byte),
        // In caret notation: control characters and letters differ in one bit.
        0..=0x1f | 0x7f => shown.extend([b'^', byte ^ 0x40]),
        _ => shown.push(byte),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(pieces: &[&[u8]]) -> String {
        let mut held = Vec::new();
        let shown: Vec<u8> = pieces.iter().flat_map(|piece| harmless(&mut held, piece)).collect();
        String::from_utf8(shown).unwrap()
    }

    #[test]
    fn text_and_colours_stay() {
        let text = "a\tb\r\n\u{1b}[1;38:5:9mred\u{1b}[0m é ± 漢\n";
        assert_eq!(shown(&[text.as_bytes()]), text);
        let bytes: Vec<&[u8]> = text.as_bytes().chunks(1).collect();
        assert_eq!(shown(&bytes), text, "also in pieces");
    }

    #[test]
    fn what_controls_a_terminal_is_shown() {
        for (sent, seen) in [
            ("\u{1b}]0;title\u{7}", "^[]0;title^G"),
            ("\u{1b}[2Jx", "^[[2Jx"),
            ("\u{1b}[6n", "^[[6n"),
            ("\u{1b}c", "^[c"),
            ("\u{1b}\u{1b}[0m", "^[\u{1b}[0m"),
            ("\u{9b}2J", "\\u{9b}2J"),
            ("a\u{8}b\u{7f}", "a^Hb^?"),
            ("\u{1b}P1$r0m\u{1b}\\", "^[P1$r0m^[\\"),
        ] {
            assert_eq!(shown(&[sent.as_bytes()]), seen, "{sent:?}");
        }
        let long = format!("\u{1b}[{}m", "1;".repeat(LONGEST));
        assert!(!shown(&[long.as_bytes()]).contains('\u{1b}'));
    }
}
