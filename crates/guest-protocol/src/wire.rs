//! Framing of messages: a little-endian `u32` length, then postcard.

use std::io::{ErrorKind, Read, Write};

use serde::{Serialize, de::DeserializeOwned};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::MAX_MESSAGE_BYTES;

/// A message could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// the peer closed the stream
    #[error("the peer closed the stream")]
    Closed,
    /// the stream failed
    #[error("the stream failed: {0}")]
    Io(#[from] std::io::Error),
    /// a message is too long
    #[error("a message of {0} bytes is longer than the {MAX_MESSAGE_BYTES} allowed")]
    TooLong(usize),
    /// a message does not decode
    #[error("a message does not decode: {0}")]
    Malformed(#[from] postcard::Error),
}

/// Writes one message and flushes it.
pub async fn write_message<T: Serialize>(writer: &mut (impl AsyncWrite + Unpin), message: &T) -> Result<(), WireError> {
    write_messages(writer, std::slice::from_ref(message)).await
}

/// Writes some messages, as many at once as go into one write, and flushes them.
pub async fn write_messages<T: Serialize>(writer: &mut (impl AsyncWrite + Unpin), messages: &[T]) -> Result<(), WireError> {
    let mut frames = Vec::new();
    for message in messages {
        frame(message, &mut frames)?;
    }
    writer.write_all(&frames).await?;
    writer.flush().await?;
    Ok(())
}

/// Reads one message. Not cancel safe: a caller that stops waiting must give the stream up.
pub async fn read_message<T: DeserializeOwned>(reader: &mut (impl AsyncRead + Unpin)) -> Result<T, WireError> {
    let mut length = [0; 4];
    reader.read_exact(&mut length).await.map_err(ended)?;
    let mut body = vec![0; body_length(length)?];
    reader.read_exact(&mut body).await?;
    Ok(postcard::from_bytes(&body)?)
}

/// [`write_message`] for a process that may wait.
pub fn write_blocking<T: Serialize>(writer: &mut impl Write, message: &T) -> Result<(), WireError> {
    let mut bytes = Vec::new();
    frame(message, &mut bytes)?;
    writer.write_all(&bytes)?;
    Ok(writer.flush()?)
}

/// [`read_message`] for a process that may wait.
pub fn read_blocking<T: DeserializeOwned>(reader: &mut impl Read) -> Result<T, WireError> {
    let mut length = [0; 4];
    reader.read_exact(&mut length).map_err(ended)?;
    let mut body = vec![0; body_length(length)?];
    reader.read_exact(&mut body)?;
    Ok(postcard::from_bytes(&body)?)
}

/// Appends a message with its length.
fn frame<T: Serialize>(message: &T, frames: &mut Vec<u8>) -> Result<(), WireError> {
    let body = postcard::to_stdvec(message)?;
    let length = u32::try_from(body.len()).ok().filter(|_| body.len() <= MAX_MESSAGE_BYTES);
    let length = length.ok_or(WireError::TooLong(body.len()))?;
    frames.extend_from_slice(&length.to_le_bytes());
    frames.extend_from_slice(&body);
    Ok(())
}

fn body_length(length: [u8; 4]) -> Result<usize, WireError> {
    let length = u32::from_le_bytes(length) as usize;
    if length > MAX_MESSAGE_BYTES { Err(WireError::TooLong(length)) } else { Ok(length) }
}

/// An end between messages is one in order.
fn ended(error: std::io::Error) -> WireError {
    if error.kind() == ErrorKind::UnexpectedEof { WireError::Closed } else { error.into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{HostMessage, StreamHeader};

    #[tokio::test]
    async fn messages_survive_the_wire() {
        let (mut near, mut far) = tokio::io::duplex(64);
        let sent = StreamHeader::Dial { port: 5000 };
        write_message(&mut near, &sent).await.unwrap();
        write_message(&mut near, &HostMessage::Detach { marker: [7; 16], parting: crate::Parting::Pause }).await.unwrap();
        drop(near);
        assert_eq!(read_message::<StreamHeader>(&mut far).await.unwrap(), sent);
        assert_eq!(
            read_message::<HostMessage>(&mut far).await.unwrap(),
            HostMessage::Detach { marker: [7; 16], parting: crate::Parting::Pause }
        );
        assert!(matches!(read_message::<HostMessage>(&mut far).await, Err(WireError::Closed)));
    }

    #[tokio::test]
    async fn who_waits_reads_the_same() {
        let mut wire = Vec::new();
        write_message(&mut wire, &StreamHeader::Log).await.unwrap();
        let mut expected = Vec::new();
        write_blocking(&mut expected, &StreamHeader::Log).unwrap();
        assert_eq!(wire, expected);
        let mut wire = wire.as_slice();
        assert_eq!(read_blocking::<StreamHeader>(&mut wire).unwrap(), StreamHeader::Log);
        assert!(matches!(read_blocking::<StreamHeader>(&mut wire), Err(WireError::Closed)));
    }

    #[tokio::test]
    async fn an_announced_length_is_not_believed() {
        let mut input: &[u8] = &u32::MAX.to_le_bytes();
        assert!(matches!(read_message::<HostMessage>(&mut input).await, Err(WireError::TooLong(_))));
    }

    #[tokio::test]
    async fn garbage_is_an_error() {
        let mut input: &[u8] = &[2, 0, 0, 0, 0xff, 0xff];
        assert!(matches!(read_message::<HostMessage>(&mut input).await, Err(WireError::Malformed(_))));
    }
}
