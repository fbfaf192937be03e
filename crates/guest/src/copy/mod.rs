//! Files of the container. PID 1's part is to start a [`helper`] in the container's mounts and to carry its bytes: nothing that the
//! container has in its file system can hold PID 1 up or lead it astray.

pub mod helper;

use std::{process::Stdio, sync::Arc};

use hearth_guest_protocol::{CopyOutput, DialReply, FileCopy, Stream, WireError, write_message};
use tokio::io::copy_bidirectional;

use crate::app::{self, Application};

/// Serves one stream until the helper is done or the host has gone, which ends the helper.
pub async fn serve(mut stream: Stream, copy: FileCopy, application: Arc<Application>) -> Result<(), WireError> {
    let Some((main, _)) = application.container().await else {
        return write_message(&mut stream, &DialReply::Refused).await;
    };
    write_message(&mut stream, &DialReply::Connected).await?;
    match app::helper::start(helper::ARGUMENT, Stdio::null(), Stdio::inherit()) {
        Ok(mut helper) => {
            write_message(&mut helper, &helper::Order { main: main.as_raw(), copy }).await?;
            copy_bidirectional(&mut stream, &mut helper).await?;
        }
        Err(error) => write_message(&mut stream, &CopyOutput::Failed { reason: format!("starting to copy: {error}") }).await?,
    }
    Ok(())
}
