//! Markers: random bytes that say where one session ends and the next begins.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt};

/// A point in the byte stream that nothing in flight can be mistaken for.
pub type Marker = [u8; 16];

/// Begins the first session after boot.
pub const BOOT_MARKER: Marker = *b"hearth-boot-0001";

/// Reads and discards bytes until the marker has been read, and not one byte more.
pub async fn await_marker(reader: &mut (impl AsyncRead + Unpin), marker: &Marker) -> io::Result<()> {
    let mut window = [0; 16];
    let mut matched = 0;
    while matched < marker.len() {
        let read = reader.read(&mut window[matched..]).await?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        // Keep the longest tail of what was read that could still become the marker.
        let filled = matched + read;
        let keep = (0..=filled).find(|&skip| marker.starts_with(&window[skip..filled])).unwrap_or(filled);
        window.copy_within(keep..filled, 0);
        matched = filled - keep;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn rest_after(input: &[u8]) -> io::Result<Vec<u8>> {
        let mut input = input;
        await_marker(&mut input, b"aabaabaaabaabaac").await?;
        Ok(input.to_vec())
    }

    #[tokio::test]
    async fn what_precedes_is_discarded_and_what_follows_is_kept() {
        assert_eq!(rest_after(b"aabaabaaabaabaacrest").await.unwrap(), b"rest");
        assert_eq!(rest_after(b"junk aabaabaaabaabaac").await.unwrap(), b"");
        assert_eq!(rest_after(b"aabaabaaabaabaabaabaaabaabaacx").await.unwrap(), b"x");
        assert_eq!(rest_after(b"aaaabaabaaabaabaacaabaab").await.unwrap(), b"aabaab");
    }

    #[tokio::test]
    async fn the_end_of_the_stream_is_an_error() {
        assert_eq!(rest_after(b"aabaabaaabaabaa").await.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
