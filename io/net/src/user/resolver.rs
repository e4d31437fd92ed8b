//! The host's name servers: as /etc/resolv.conf has them (resolv.conf(5)), or as the user says.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::SystemTime;

const PORT: u16 = 53;
/// As many as the C library takes.
const SERVERS_MAX: usize = 3;

/// Name servers to forward to.
pub struct Resolvers {
    servers: Vec<SocketAddr>,
    file: Option<(PathBuf, Option<SystemTime>)>,
}

impl Resolvers {
    /// These.
    pub fn fixed(servers: Vec<SocketAddr>) -> Self {
        Resolvers {
            servers,
            file: None,
        }
    }

    /// Those that `file` names, whenever it is asked.
    pub fn of_file(file: impl Into<PathBuf>) -> Self {
        Resolvers {
            servers: Vec::new(),
            file: Some((file.into(), None)),
        }
    }

    /// The server to ask at the so-manieth attempt.
    pub fn get(&mut self, attempt: usize) -> Option<SocketAddr> {
        self.refresh();
        let n = self.servers.len();
        (n > 0).then(|| self.servers[attempt % n])
    }

    fn refresh(&mut self) {
        let Some((path, read_at)) = &mut self.file else {
            return;
        };
        let changed = path.metadata().and_then(|m| m.modified()).ok();
        if self.servers.is_empty() || changed != *read_at {
            *read_at = changed;
            self.servers = parse(&std::fs::read_to_string(path).unwrap_or_default());
        }
    }
}

fn parse(text: &str) -> Vec<SocketAddr> {
    let server = |line: &str| {
        let mut words = line.split_whitespace();
        let address = words
            .next()
            .filter(|w| *w == "nameserver")
            .and(words.next());
        let address = address?.split('%').next()?.parse::<IpAddr>().ok()?;
        Some(SocketAddr::new(address, PORT))
    };
    let mut servers: Vec<_> = text.lines().filter_map(server).take(SERVERS_MAX).collect();
    if servers.is_empty() {
        // What the C library does without a name server in the file.
        servers.push((Ipv4Addr::LOCALHOST, PORT).into());
    }
    servers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_servers_are_read_as_the_c_library_reads_them() {
        let text = "# nameserver 192.0.2.9\nnameserver 192.0.2.1\nsearch x\n nameserver ::1 # c\n\
                    nameserver nonsense\nnameserver 127.0.0.53\nnameserver 192.0.2.4\n";
        let servers: Vec<_> = parse(text).iter().map(ToString::to_string).collect();
        assert_eq!(servers, ["192.0.2.1:53", "[::1]:53", "127.0.0.53:53"]);
        assert_eq!(parse("options x"), ["127.0.0.1:53".parse().unwrap()]);
    }

    #[test]
    fn attempts_go_round_the_servers() {
        let servers: Vec<SocketAddr> = ["192.0.2.1:53", "192.0.2.2:53"]
            .map(|s| s.parse().unwrap())
            .to_vec();
        let mut resolvers = Resolvers::fixed(servers.clone());
        assert_eq!(
            [0, 1, 2].map(|n| resolvers.get(n)),
            [servers[0], servers[1], servers[0]].map(Some)
        );
        assert_eq!(Resolvers::fixed(vec![]).get(0), None);
    }
}
