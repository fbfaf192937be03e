//! The endpoint proxy between real clients and applications that misbehave in every way they can.

#![forbid(unsafe_code)]

mod app_tls;
mod forward;
mod http2;
mod limits;
mod refuse;
mod shell;
mod stop;
mod support;
mod tls;
mod wake;
mod websocket;
