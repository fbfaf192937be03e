//! Bodies on their way through the proxy: never gathered, only passed on, each knowing what must happen when it stops early.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::{sync::Notify, time::timeout};
use tracing::{Span, debug};

use crate::{app::App, error::Side, linger::Unwanted};

/// How long an application may take to decide whether it wants a body. Many never say, so the body is sent then (RFC 9110, 10.1.1).
const DECISION: Duration = Duration::from_secs(1);

/// A request's body. Dropped before its end, it sees to what the client is still sending.
pub(crate) struct Upload {
    /// Absent where the request has none.
    body: Option<Incoming>,
    ended: bool,
    /// Takes the rest; absent with the body.
    unwanted: Option<Unwanted>,
    /// Until then nothing is taken from the client, which is not told to continue either.
    held: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
}

impl Upload {
    pub(crate) fn new(body: Incoming, unwanted: Unwanted) -> Self {
        Self { body: Some(body), ended: false, unwanted: Some(unwanted), held: None }
    }

    /// The body of a request that is sent once more.
    pub(crate) fn empty() -> Self {
        Self { body: None, ended: true, unwanted: None, held: None }
    }

    /// Waits with the body until the application says that it wants it.
    pub(crate) fn hold(&mut self, wanted: Arc<Notify>) {
        self.held = Some(Box::pin(async move {
            let _ = timeout(DECISION, wanted.notified()).await;
        }));
    }
}

impl Body for Upload {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        if let Some(held) = &mut self.held {
            ready!(held.as_mut().poll(cx));
            self.held = None;
        }
        let Some(body) = &mut self.body else { return Poll::Ready(None) };
        let frame = Pin::new(body).poll_frame(cx);
        self.ended |= matches!(frame, Poll::Ready(None));
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or(SizeHint::with_exact(0), Body::size_hint)
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        if self.ended || self.is_end_stream() {
            return;
        }
        if let (Some(body), Some(unwanted)) = (self.body.take(), &self.unwanted) {
            unwanted.leave(body);
        }
    }
}

/// A response's body. The connection to the application ends with it, so a client that leaves costs the guest nothing.
pub(crate) struct Download {
    body: Incoming,
    span: Span,
    _app: App,
}

impl Download {
    pub(crate) fn new(body: Incoming, app: App) -> Self {
        Self { body, span: Span::current(), _app: app }
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
