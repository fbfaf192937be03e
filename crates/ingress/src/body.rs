//! Bodies on their way through the proxy: never gathered, only passed on, each knowing what must happen when it stops early.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use tokio_util::task::AbortOnDropHandle;
use tracing::{Span, debug};

use crate::{error::Side, linger::StillSending};

/// A request's body. Dropped before its end, it notes that the client may still be sending.
pub(crate) struct Upload {
    body: Incoming,
    ended: bool,
    client: StillSending,
}

impl Upload {
    pub(crate) fn new(body: Incoming, client: StillSending) -> Self {
        Self { body, ended: false, client }
    }
}

impl Body for Upload {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let frame = Pin::new(&mut self.body).poll_frame(cx);
        self.ended |= matches!(frame, Poll::Ready(None));
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        if !self.ended && !self.body.is_end_stream() {
            self.client.set();
        }
    }
}

/// A response's body. The connection to the guest ends with it, so a client that leaves costs the guest nothing.
pub(crate) struct Download {
    body: Incoming,
    span: Span,
    _connection: AbortOnDropHandle<()>,
}

impl Download {
    pub(crate) fn new(body: Incoming, connection: AbortOnDropHandle<()>) -> Self {
        Self { body, span: Span::current(), _connection: connection }
    }
}

impl Body for Download {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let frame = Pin::new(&mut self.body).poll_frame(cx);
        if let Poll::Ready(Some(Err(error))) = &frame {
            debug!(parent: &self.span, side = %Side::Guest, %error, "the response was cut off");
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
