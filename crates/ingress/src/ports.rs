//! Finds out which ports speak TLS, from how they answer plain HTTP. Nothing announces it, and a handshake tried on every new port would be
//! noise in the logs of the many applications that do not (SPEC 17, #10).
//!
//! ```text
//!            ┌────────── an answer, or no TLS when tried ─────────┐
//!   unknown ─┤                                                    ├─▶ plain ──no answer──▶ unknown
//!            └─ no HTTP answer, or 400 ─▶ try TLS ─ it speaks it ─┴─▶ TLS ──no handshake──▶ unknown
//! ```

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use hearth_control::plane::Admission;
use http::StatusCode;
use tokio::time::Instant;

use crate::error::RequestError;

/// An application that gives no HTTP answer and speaks no TLS is not asked again for this long.
const PATIENCE: Duration = Duration::from_secs(60);

/// What is remembered has a limit; what is forgotten is found out again.
const MAX_MICROVMS: usize = 4096;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Port {
    Plain,
    Tls,
    /// Neither, at that time.
    Neither(Instant),
}

/// What is known of the ports of MicroVMs.
#[derive(Debug, Default)]
pub(crate) struct Ports(Mutex<HashMap<String, HashMap<u16, Port>>>);

impl Ports {
    pub(crate) fn speaks_tls(&self, admission: &Admission) -> bool {
        self.get(admission) == Some(Port::Tls)
    }

    /// Whether the next answer may show that the port speaks TLS.
    pub(crate) fn is_unknown(&self, admission: &Admission) -> bool {
        match self.get(admission) {
            None => true,
            Some(Port::Plain | Port::Tls) => false,
            Some(Port::Neither(since)) => since.elapsed() >= PATIENCE,
        }
    }

    /// Notes how plain HTTP was answered.
    pub(crate) fn answered(&self, admission: &Admission, answer: Result<StatusCode, &RequestError>) {
        match answer {
            Ok(_) => self.set(admission, Some(Port::Plain)),
            Err(RequestError::NoAnswer(_)) if self.get(admission) == Some(Port::Plain) => self.set(admission, None),
            Err(_) => {}
        }
    }

    /// Notes what became of a TLS handshake.
    pub(crate) fn tried(&self, admission: &Admission, spoke_tls: bool) {
        let known = self.get(admission);
        match (spoke_tls, known) {
            (true, _) => self.set(admission, Some(Port::Tls)),
            (false, Some(Port::Tls)) => self.set(admission, None),
            (false, _) => self.set(admission, Some(Port::Neither(Instant::now()))),
        }
    }

    fn get(&self, admission: &Admission) -> Option<Port> {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.get(&admission.microvm_id)?.get(&admission.port).copied()
    }

    fn set(&self, admission: &Admission, port: Option<Port>) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= MAX_MICROVMS && !known.contains_key(&admission.microvm_id) {
            known.clear();
        }
        let ports = known.entry(admission.microvm_id.clone()).or_default();
        match port {
            Some(port) => ports.insert(admission.port, port),
            None => ports.remove(&admission.port),
        };
    }
}

/// Whether an answer to plain HTTP is what servers that expect TLS give: an alert or nothing at all, or a complaint in HTTP.
pub(crate) fn hints_at_tls(answer: Result<StatusCode, &RequestError>) -> bool {
    matches!(answer, Ok(StatusCode::BAD_REQUEST) | Err(RequestError::NoAnswer(_)))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use hearth_control::{plane::Activity, token::TokenKind};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_port_is_asked_for_tls_until_it_has_shown_what_it_speaks() {
        let admission = Admission {
            microvm_id: "vm".into(),
            kind: TokenKind::Http,
            port: 8080,
            memory_mib: 512,
            activity: Arc::new(Activity::default()),
        };
        let ports = Ports::default();
        assert!(ports.is_unknown(&admission) && !ports.speaks_tls(&admission));
        ports.tried(&admission, false);
        assert!(!ports.is_unknown(&admission), "not again and again");
        tokio::time::advance(PATIENCE).await;
        assert!(ports.is_unknown(&admission));
        ports.tried(&admission, true);
        assert!(ports.speaks_tls(&admission));
        ports.tried(&admission, false);
        assert!(ports.is_unknown(&admission), "it spoke TLS once, so it may have become another application");
        ports.answered(&admission, Ok(StatusCode::OK));
        assert!(!ports.is_unknown(&admission) && !ports.speaks_tls(&admission));
        assert!(ports.is_unknown(&Admission { port: 1, ..admission }));
    }
}
