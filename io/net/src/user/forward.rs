//! Forwarded ports: sockets on the host that lead to the guest.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::io::{Errno, retry_on_intr};
use rustix::net::{
    AddressFamily, RecvFlags, SocketFlags, SocketType, acceptfrom_with, bind, listen, sockopt,
};

use crate::user::network::{Network, seen_from_guest};
use crate::user::poller::{Kind, Poller, Token};
use crate::user::session::Sessions;
use crate::user::tcp::Tcp;

const BACKLOG: i32 = 128;
/// Clients that are let in before others have their turn.
const AT_ONCE: usize = 64;

/// Who is left at a forwarded port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waiting {
    /// Nobody; the poller tells of the next.
    Nobody,
    /// There may be more.
    More,
    /// Somebody, for whom the host has no room now. The poller tells of them no more.
    WithoutRoom,
}

/// The protocol of a forwarded port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// A port to forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forward {
    /// TCP or UDP.
    pub transport: Transport,
    /// Where on the host.
    pub host: SocketAddr,
    /// Where in the guest.
    pub guest: SocketAddrV4,
}

/// Why a port cannot be forwarded.
#[derive(Debug, thiserror::Error)]
#[error("{} cannot be forwarded: {}", .0.host, explain(*.1))]
pub struct ForwardError(pub Forward, pub Errno);

fn explain(error: Errno) -> String {
    match error {
        Errno::ADDRINUSE => "the port is taken; choose another one".to_owned(),
        Errno::ACCESS => "ports below 1024 are root's; choose a higher one".to_owned(),
        Errno::ADDRNOTAVAIL => "the host does not have this address".to_owned(),
        other => std::io::Error::from(other).to_string(),
    }
}

/// The sockets of forwarded ports.
#[derive(Default)]
pub struct Forwards {
    ports: Vec<(Forward, Arc<OwnedFd>)>,
    datagram: Vec<u8>,
}

impl Forwards {
    /// Opens the ports.
    pub fn open(forwards: &[Forward], poller: &Poller) -> Result<Self, ForwardError> {
        let mut ports = Vec::new();
        for (n, forward) in forwards.iter().enumerate() {
            let kind = match forward.transport {
                Transport::Tcp => Kind::Listener,
                Transport::Udp => Kind::UdpForward,
            };
            let socket = open(forward).map_err(|error| ForwardError(*forward, error))?;
            poller
                .add(&socket, Token::new(kind, n as u32, 0))
                .map_err(|_| ForwardError(*forward, Errno::MFILE))?;
            ports.push((*forward, Arc::new(socket)));
        }
        Ok(Forwards {
            ports,
            datagram: vec![0; 65535],
        })
    }

    /// Lets clients in.
    pub fn accept(&self, token: Token, network: &mut Network, tcp: &mut Tcp) -> Waiting {
        let Some((forward, listener)) = self.ports.get(token.index() as usize) else {
            return Waiting::Nobody;
        };
        for _ in 0..AT_ONCE {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            match acceptfrom_with(&**listener, flags) {
                Ok((socket, client)) => {
                    let client = client.and_then(|c| SocketAddr::try_from(c).ok());
                    let client = client.unwrap_or((Ipv4Addr::LOCALHOST, 1024).into());
                    tcp.call(network, socket, seen_from_guest(client), forward.guest);
                }
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(Errno::AGAIN) => return Waiting::Nobody,
                // The host has no descriptor or no memory left.
                Err(_) => return Waiting::WithoutRoom,
            }
        }
        Waiting::More
    }

    /// Passes datagrams on.
    pub fn receive(
        &mut self,
        token: Token,
        network: &mut Network,
        sessions: &mut Sessions,
    ) -> Waiting {
        let number = token.index();
        let Some((forward, socket)) = self.ports.get(number as usize) else {
            return Waiting::Nobody;
        };
        for _ in 0..AT_ONCE {
            let buffer = &mut self.datagram[..];
            let receive = || rustix::net::recvfrom(&**socket, &mut *buffer, RecvFlags::DONTWAIT);
            let mut receive = receive;
            match retry_on_intr(&mut receive) {
                Ok((n, _, client)) => {
                    if let Some(client) = client.and_then(|c| SocketAddr::try_from(c).ok()) {
                        let seen = (client, seen_from_guest(client));
                        let data = &self.datagram[..n];
                        sessions.forward(network, (number, socket), seen, forward.guest, data);
                    }
                }
                Err(Errno::AGAIN) => return Waiting::Nobody,
                // The error of an earlier answer.
                Err(_) => {}
            }
        }
        Waiting::More
    }
}

fn open(forward: &Forward) -> Result<OwnedFd, Errno> {
    let family = match forward.host {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let (kind, stream) = match forward.transport {
        Transport::Tcp => (SocketType::STREAM, true),
        Transport::Udp => (SocketType::DGRAM, false),
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, kind, flags, None)?;
    if stream {
        sockopt::set_socket_reuseaddr(&socket, true)?;
    }
    bind(&socket, &forward.host)?;
    if stream {
        listen(&socket, BACKLOG)?;
    }
    Ok(socket)
}
