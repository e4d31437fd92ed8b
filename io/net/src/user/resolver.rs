//! The host's name servers: as /etc/resolv.conf has them (resolv.conf(5)), or as the user says.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::SystemTime;

use doppel_device::{NANOS_PER_SECOND, Nanos};

const PORT: u16 = 53;
/// As many as the C library takes.
const SERVERS_MAX: usize = 3;
/// A question that comes sooner is another one: C libraries ask for both kinds of addresses at once.
const ASKED_AGAIN: Nanos = NANOS_PER_SECOND;
/// Nobody asks again later than that.
const GIVEN_UP: Nanos = 15 * NANOS_PER_SECOND;
/// So long the others are asked.
const LEFT_OUT: Nanos = 60 * NANOS_PER_SECOND;

/// By what a file shows that it is another.
type Stamp = (Option<SystemTime>, u64, u64);

/// Name servers to forward to. The first is asked, unless it lately did not answer: then the next one. Who asks again may do so from
/// another port, so that is everybody's experience.
pub struct Resolvers {
    servers: Vec<SocketAddr>,
    file: Option<(PathBuf, Option<Stamp>)>,
    /// Which of them is asked, and until when if it is not the first.
    at: usize,
    until: Nanos,
    /// Since when it owes an answer.
    silent_since: Option<Nanos>,
}

impl Resolvers {
    /// These.
    pub fn fixed(servers: Vec<SocketAddr>) -> Self {
        Resolvers {
            servers,
            file: None,
            at: 0,
            until: 0,
            silent_since: None,
        }
    }

    /// Those that `file` names, whenever it is asked.
    pub fn of_file(file: impl Into<PathBuf>) -> Self {
        Resolvers {
            file: Some((file.into(), None)),
            ..Resolvers::fixed(Vec::new())
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.servers.len()
    }

    /// The server to ask.
    pub fn get(&mut self, now: Nanos) -> Option<SocketAddr> {
        self.refresh();
        if self.at > 0 && now >= self.until {
            (self.at, self.silent_since) = (0, None);
        }
        let silent = self.silent_since.map_or(0, |at| now.saturating_sub(at));
        if silent >= GIVEN_UP {
            self.silent_since = None;
        } else if silent >= ASKED_AGAIN {
            self.leave(now);
        }
        self.current()
    }

    /// It was asked something.
    pub fn asked(&mut self, server: SocketAddr, now: Nanos) {
        if self.current() == Some(server) {
            self.silent_since.get_or_insert(now);
        }
    }

    /// It answered.
    pub fn answered(&mut self, server: SocketAddr) {
        if self.current() == Some(server) {
            self.silent_since = None;
        }
    }

    /// It is not there.
    pub fn failed(&mut self, server: SocketAddr, now: Nanos) {
        if self.current() == Some(server) {
            self.leave(now);
        }
    }

    fn current(&self) -> Option<SocketAddr> {
        self.servers.get(self.at).copied()
    }

    /// Turns to the next one.
    fn leave(&mut self, now: Nanos) {
        self.at = (self.at + 1) % self.servers.len().max(1);
        (self.until, self.silent_since) = (now + LEFT_OUT, None);
    }

    fn refresh(&mut self) {
        let Some((path, read_at)) = &mut self.file else {
            return;
        };
        let metadata = path.metadata().ok();
        let stamp = metadata.map(|m| (m.modified().ok(), m.len(), m.ino()));
        if self.servers.is_empty() || stamp != *read_at {
            *read_at = stamp;
            self.servers = parse(&std::fs::read_to_string(path).unwrap_or_default());
            (self.at, self.silent_since) = (0, None);
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
    fn a_server_that_does_not_answer_is_left_for_a_while() {
        let servers = ["192.0.2.1:53", "192.0.2.2:53"].map(|s| s.parse::<SocketAddr>().unwrap());
        let [first, second] = servers;
        let mut resolvers = Resolvers::fixed(servers.to_vec());
        let mut asked_at = |tenths: u64, answers: bool| {
            let now = tenths * NANOS_PER_SECOND / 10;
            let server = resolvers.get(now).unwrap();
            resolvers.asked(server, now);
            if answers {
                resolvers.answered(server);
            }
            server
        };
        assert_eq!(asked_at(0, true), first);
        assert_eq!(asked_at(20, false), first);
        assert_eq!(asked_at(21, false), first, "another question");
        assert_eq!(asked_at(31, true), second);
        assert_eq!(asked_at(600, true), second);
        assert_eq!(asked_at(700, false), first, "it has its chance again");
        assert_eq!(asked_at(900, false), first, "nobody asked again");
        assert_eq!(asked_at(950, false), second);
        assert_eq!(asked_at(965, false), first, "the other one is no better");
        assert_eq!(Resolvers::fixed(vec![]).get(0), None);
    }

    /// Within a tick of the host's clock, say.
    #[test]
    fn a_file_that_is_replaced_by_one_of_the_same_time_is_read() {
        let folder = std::env::temp_dir().join(format!("doppel-resolv-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join("resolv.conf");
        let put = |text: &str| {
            let new = folder.join("new");
            std::fs::write(&new, text).unwrap();
            let file = std::fs::File::options().write(true).open(&new).unwrap();
            file.set_modified(SystemTime::UNIX_EPOCH).unwrap();
            std::fs::rename(&new, &path).unwrap();
        };
        put("nameserver 192.0.2.1");
        let mut resolvers = Resolvers::of_file(&path);
        let mut server = || resolvers.get(0).unwrap().to_string();
        assert_eq!(server(), "192.0.2.1:53");
        put("nameserver 192.0.2.2");
        assert_eq!(server(), "192.0.2.2:53");
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
