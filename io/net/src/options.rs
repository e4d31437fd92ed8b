//! `--net`: what a user writes, and the back-end that comes of it.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};
use std::os::fd::OwnedFd;
use std::process::Child;
use std::str::FromStr;
use std::sync::Arc;

use doppel_device::Clock;

use crate::link::Link;
use crate::remote::RemoteLink;
use crate::switch::{Switch, SwitchError};
use crate::tap_unsafe::{Tap, TapError};
use crate::user::{Forward, GUEST, Transport, UserConfig, UserError, UserNetwork, may_be_guest};

/// The address that the first card of a machine has where nobody gives it another; QEMU's.
const FIRST_MAC: [u8; 6] = [0x52, 0x54, 0x00, 0x12, 0x34, 0x56];
const DNS_PORT: u16 = 53;
const MTU_MIN: u16 = 576;
const MTU_MAX: u16 = 65520;

const KINDS: &str = "user, switch=NAME, tap=NAME or none";
const USER_OPTIONS: &str = "hostfwd=tcp|udp:[ADDRESS]:PORT-[ADDRESS]:PORT, restrict, dns=ADDRESS[:PORT], mtu=N, mac=MAC, at-once=on|off";
const OPTIONS: &str = "mac=MAC, at-once=on|off";

/// What a card is plugged into.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Network {
    /// A network of its own behind the monitor's process.
    User(UserConfig),
    /// A switch with this name.
    Switch(String),
    /// A tap device with this name.
    Tap(String),
}

/// A network card.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetConfig {
    /// What it is plugged into.
    pub network: Network,
    /// Its address, where somebody chose one.
    pub mac: Option<[u8; 6]>,
    /// What the guest sends is dealt with by the vCPU itself where that is possible, not by the card's thread.
    pub at_once: bool,
}

/// Why a back-end cannot be had.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum NetError {
    #[error("--net user: {0}")]
    User(#[from] UserError),
    #[error("--net switch: {0}")]
    Switch(#[from] SwitchError),
    #[error("--net tap: {0}")]
    Tap(#[from] TapError),
    /// The process that is to have it cannot be started, or says why it does not have it.
    #[error("{0}")]
    Domain(io::Error),
}

/// Starts the process that is to have a card's network: which card, and the end of the socket that [`crate::serve`] takes.
pub type StartNetwork = Arc<dyn Fn(u8, OwnedFd) -> io::Result<Child> + Send + Sync>;

impl Default for NetConfig {
    fn default() -> Self {
        NetConfig {
            network: Network::User(UserConfig::default()),
            mac: None,
            at_once: true,
        }
    }
}

impl NetConfig {
    /// The back-end, and the MAC address of the card with this number.
    pub fn open(
        &self,
        number: u8,
        clock: Arc<dyn Clock>,
    ) -> Result<(Box<dyn Link>, [u8; 6]), NetError> {
        let mut mac = FIRST_MAC;
        mac[5] = mac[5].wrapping_add(number);
        let mac = self.mac.unwrap_or(mac);
        Ok(match &self.network {
            Network::User(config) => (Box::new(UserNetwork::new(config, mac, clock)?), mac),
            Network::Tap(name) => (Box::new(Tap::open(name)?), mac),
            Network::Switch(name) => {
                let switch = Switch::join(name, clock)?;
                let mac = self.mac.unwrap_or(switch.mac());
                (Box::new(switch), mac)
            }
        })
    }

    /// The same, in a process that `start` starts.
    pub fn open_apart(
        &self,
        number: u8,
        start: &StartNetwork,
        clock: Arc<dyn Clock>,
    ) -> Result<(Box<dyn Link>, [u8; 6]), NetError> {
        let start = start.clone();
        let ends_connections = matches!(self.network, Network::User(_));
        let start = Box::new(move |socket| start(number, socket));
        let remote = RemoteLink::new(start, ends_connections, clock);
        let (link, mac) = remote.map_err(NetError::Domain)?;
        Ok((Box::new(link), mac))
    }

    /// The longest IP packet of this network.
    pub fn mtu(&self) -> u16 {
        match &self.network {
            Network::User(config) => config.mtu,
            _ => 1500,
        }
    }
}

/// As [`NetConfig::from_str`] reads it.
impl fmt::Display for NetConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.network {
            Network::Switch(name) => write!(f, "switch={name}")?,
            Network::Tap(name) => write!(f, "tap={name}")?,
            Network::User(user) => {
                write!(f, "user,mtu={}", user.mtu)?;
                if user.restrict {
                    f.write_str(",restrict")?;
                }
                for server in &user.dns {
                    write!(f, ",dns={server}")?;
                }
                for forward in &user.forwards {
                    let transport = match forward.transport {
                        Transport::Tcp => "tcp",
                        Transport::Udp => "udp",
                    };
                    let (host, guest) = (forward.host, forward.guest);
                    write!(f, ",hostfwd={transport}:{host}-{guest}")?;
                }
            }
        }
        if let Some([a, b, c, d, e, g]) = self.mac {
            write!(f, ",mac={a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")?;
        }
        match self.at_once {
            true => Ok(()),
            false => f.write_str(",at-once=off"),
        }
    }
}

impl FromStr for NetConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (kind, options) = text.split_once(',').unwrap_or((text, ""));
        let network = match kind.split_once('=') {
            None if kind == "user" => Network::User(UserConfig::default()),
            Some(("switch", name)) if !name.is_empty() => Network::Switch(name.to_owned()),
            Some(("tap", name)) if !name.is_empty() => Network::Tap(name.to_owned()),
            _ => return Err(format!("{kind:?} is no network: write {KINDS}")),
        };
        let mut config = NetConfig {
            network,
            ..NetConfig::default()
        };
        for option in options.split(',').filter(|option| !option.is_empty()) {
            config.set(option)?;
        }
        Ok(config)
    }
}

impl NetConfig {
    fn set(&mut self, option: &str) -> Result<(), String> {
        let (name, value) = option.split_once('=').unwrap_or((option, ""));
        if name == "mac" {
            self.mac = Some(mac(value)?);
            return Ok(());
        }
        if name == "at-once" {
            self.at_once = switch(name, value)?;
            return Ok(());
        }
        let Network::User(user) = &mut self.network else {
            return Err(format!(
                "{name:?} is no option of this network: it has {OPTIONS}"
            ));
        };
        match name {
            "hostfwd" => user.forwards.push(forward(value)?),
            "restrict" => user.restrict = switch(name, value)?,
            "dns" => user.dns.push(server(value)?),
            "mtu" => user.mtu = mtu(value)?,
            _ => {
                return Err(format!(
                    "{name:?} is no option of a user network: it has {USER_OPTIONS}"
                ));
            }
        }
        Ok(())
    }
}

fn switch(name: &str, value: &str) -> Result<bool, String> {
    match value {
        "" | "on" | "yes" => Ok(true),
        "off" | "no" => Ok(false),
        _ => Err(format!("{name} is on or off, not {value:?}")),
    }
}

fn mtu(value: &str) -> Result<u16, String> {
    let number = value.parse().ok();
    number
        .filter(|n| (MTU_MIN..=MTU_MAX).contains(n))
        .ok_or_else(|| format!("an MTU is a number from {MTU_MIN} to {MTU_MAX}, not {value:?}"))
}

fn server(value: &str) -> Result<SocketAddr, String> {
    let with_port = value.parse().ok();
    let without = || value.parse::<IpAddr>().ok().map(|ip| (ip, DNS_PORT).into());
    with_port
        .or_else(without)
        .ok_or_else(|| format!("{value:?} is no address of a name server, as in 192.0.2.1"))
}

fn mac(value: &str) -> Result<[u8; 6], String> {
    let digits = |part: &str| match part.len() {
        2 => u8::from_str_radix(part, 16).ok(),
        _ => None,
    };
    let bytes: Option<Vec<u8>> = value.split(':').map(digits).collect();
    bytes
        .and_then(|bytes| <[u8; 6]>::try_from(bytes).ok())
        .filter(|mac| mac[0] & 1 == 0 && mac != &[0; 6])
        .ok_or_else(|| format!("{value:?} is no MAC address of a card, as in 52:54:00:12:34:56"))
}

/// `tcp:[ADDRESS]:PORT-[ADDRESS]:PORT`, with the host's end first.
fn forward(value: &str) -> Result<Forward, String> {
    let wrong = || {
        format!(
            "{value:?} is no forwarded port, as in hostfwd=tcp:127.0.0.1:2222-:22 (PROTOCOL:[ADDRESS]:PORT-[ADDRESS]:PORT)"
        )
    };
    let (protocol, rest) = value.split_once(':').ok_or_else(wrong)?;
    let transport = match protocol {
        "tcp" | "" => Transport::Tcp,
        "udp" => Transport::Udp,
        _ => return Err(wrong()),
    };
    let (host, guest) = rest.rsplit_once('-').ok_or_else(wrong)?;
    let (host, host_port) = end(host).ok_or_else(wrong)?;
    let (guest, guest_port) = end(guest).ok_or_else(wrong)?;
    let guest = match guest {
        None => GUEST,
        Some(IpAddr::V4(ip)) if may_be_guest(ip) => ip,
        Some(IpAddr::V4(ip)) => {
            return Err(format!(
                "{value:?} leads to no guest: {ip} is none of the addresses in 10.0.2.0/24 that a guest may have; without one, as in hostfwd=tcp::2222-:22, it is {GUEST}"
            ));
        }
        Some(IpAddr::V6(_)) => return Err(wrong()),
    };
    Ok(Forward {
        transport,
        host: (host.unwrap_or(Ipv4Addr::LOCALHOST.into()), host_port).into(),
        guest: SocketAddrV4::new(guest, guest_port),
    })
}

fn end(text: &str) -> Option<(Option<IpAddr>, u16)> {
    let (address, port) = text.rsplit_once(':')?;
    let port = port.parse().ok().filter(|port| *port != 0)?;
    let address = address.trim_start_matches('[').trim_end_matches(']');
    let address = match address {
        "" => None,
        address => Some(address.parse().ok()?),
    };
    Some((address, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(text: &str) -> UserConfig {
        match text.parse::<NetConfig>().unwrap().network {
            Network::User(user) => user,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn forwarded_ports_are_written_as_for_qemu() {
        let of = |text: &str| {
            let Forward {
                transport,
                host,
                guest,
            } = user(&format!("user,hostfwd={text}")).forwards[0];
            format!("{transport:?} {host} {guest}")
        };
        assert_eq!(of("tcp::2222-:22"), "Tcp 127.0.0.1:2222 10.0.2.15:22");
        assert_eq!(
            of("udp:0.0.0.0:53-10.0.2.16:5353"),
            "Udp 0.0.0.0:53 10.0.2.16:5353"
        );
        assert_eq!(of("tcp:[::1]:80-:8080"), "Tcp [::1]:80 10.0.2.15:8080");
        for wrong in [
            "",
            "tcp",
            "tcp:22",
            "tcp::22-22",
            "tcp::0-:22",
            "tcp::22-:99999",
            "sctp::1-:2",
            "tcp::1-[::1]:2",
            "tcp::1-192.0.2.1:2",
            "tcp::1-10.0.2.2:2",
        ] {
            let message = format!("user,hostfwd={wrong}")
                .parse::<NetConfig>()
                .unwrap_err();
            assert!(message.contains("2222-:22"), "{message}");
        }
    }

    #[test]
    fn options_are_taken_and_mistakes_say_what_to_write() {
        let config = user(
            "user,restrict,dns=192.0.2.1,dns=[::1]:5353,mtu=9000,hostfwd=tcp::1-:2,hostfwd=tcp::3-:4",
        );
        assert!(config.restrict && config.mtu == 9000 && config.forwards.len() == 2);
        let dns: Vec<_> = config.dns.iter().map(ToString::to_string).collect();
        assert_eq!(dns, ["192.0.2.1:53", "[::1]:5353"]);
        let config: NetConfig = "switch=lab,mac=52:54:00:00:00:01".parse().unwrap();
        assert_eq!(config.network, Network::Switch("lab".into()));
        assert_eq!(config.mac, Some([0x52, 0x54, 0, 0, 0, 1]));
        for (wrong, hint) in [
            ("", "switch=NAME"),
            ("bridge", "switch=NAME"),
            ("switch", "switch=NAME"),
            ("tap=", "tap=NAME"),
            ("user,ipv6=on", "hostfwd="),
            ("tap=tap0,dns=192.0.2.1", "mac=MAC"),
            ("user,mac=01:00:00:00:00:00", "52:54:00"),
            ("user,mac=1:2:3", "52:54:00"),
            ("user,mtu=100", "576"),
            ("user,dns=localhost", "192.0.2.1"),
            ("user,restrict=maybe", "on or off"),
        ] {
            let message = wrong.parse::<NetConfig>().unwrap_err();
            assert!(message.contains(hint), "{wrong}: {message}");
        }
    }

    #[test]
    fn what_is_written_is_read_as_it_was() {
        for text in [
            "user",
            "user,restrict,dns=192.0.2.1,dns=[::1]:5353,mtu=9000,at-once=off",
            "user,hostfwd=tcp::1-:2,hostfwd=udp:[::1]:53-10.0.2.16:5353,mac=52:54:00:0a:00:01",
            "switch=lab,mac=52:54:00:00:00:01",
            "tap=tap0,at-once=off",
        ] {
            let config: NetConfig = text.parse().unwrap();
            assert_eq!(config.to_string().parse(), Ok(config), "{text}");
        }
    }

    #[test]
    fn each_card_has_its_own_address() {
        let clock: Arc<dyn Clock> = Arc::new(doppel_device::HostClock::new());
        let mac = |n| NetConfig::default().open(n, clock.clone()).unwrap().1;
        assert_eq!(mac(0), FIRST_MAC);
        assert_ne!(mac(1), mac(0));
    }
}
