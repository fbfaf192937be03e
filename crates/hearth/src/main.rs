//! The `hearth` command: the server, its doctor, and shortcuts for people.

#![forbid(unsafe_code)]

mod admin;
mod cli;
mod client;
mod config;
mod connect;
mod credentials;
mod data_dir;
mod doctor;
mod iam;
mod ports;
mod roles;
mod serve;
mod trust;
mod verbs;

fn main() -> std::process::ExitCode {
    cli::main()
}
