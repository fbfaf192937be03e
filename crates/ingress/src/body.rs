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
use tokio_util::task::{TaskTracker, task_tracker::TaskTrackerToken};
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

/// How long an answer that has broken off waits until the client has taken what came before.
const LEAVE: Duration = Duration::from_secs(2);

/// A response's body. The connection to the application ends with it, so a client that leaves costs the guest nothing.
///
/// An HTTP/2 stream is reset when its body fails, and the reset drops the stream's data that is not written yet (h2 empties the stream's queue).
/// So a failure is told only when everything before it is written.
pub(crate) struct Download {
    body: Incoming,
    /// Counts the pieces that are not written yet.
    unwritten: TaskTracker,
    failure: Option<Failure>,
    span: Span,
    _app: App,
}

/// The body has failed. It is told when `written` is done.
struct Failure {
    error: Option<hyper::Error>,
    written: Pin<Box<dyn Future<Output = ()> + Send>>,
}

/// A piece of the body. hyper drops it when its bytes are written, or when they will not be.
struct Piece {
    bytes: Bytes,
    _unwritten: TaskTrackerToken,
}

impl AsRef<[u8]> for Piece {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Download {
    pub(crate) fn new(body: Incoming, app: App) -> Self {
        Self { body, unwritten: TaskTracker::new(), failure: None, span: Span::current(), _app: app }
    }

    fn fail(&mut self, error: hyper::Error) -> &mut Failure {
        debug!(parent: &self.span, side = %Side::Guest, %error, "the response was cut off");
        self.unwritten.close();
        let unwritten = self.unwritten.clone();
        let written = Box::pin(async move {
            let _ = timeout(LEAVE, unwritten.wait()).await;
        });
        self.failure.insert(Failure { error: Some(error), written })
    }
}

impl Body for Download {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let this = &mut *self;
        let failure = match &mut this.failure {
            Some(failure) => failure,
            None => match ready!(Pin::new(&mut this.body).poll_frame(cx)) {
                Some(Ok(frame)) => {
                    let piece = |bytes| Bytes::from_owner(Piece { bytes, _unwritten: this.unwritten.token() });
                    return Poll::Ready(Some(Ok(frame.map_data(piece))));
                }
                Some(Err(error)) => this.fail(error),
                None => return Poll::Ready(None),
            },
        };
        ready!(failure.written.as_mut().poll(cx));
        Poll::Ready(failure.error.take().map(Err))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
