//! The escape key: what the user types goes to the guest, but for commands that follow Ctrl-A.

/// Ctrl-A, as in QEMU and screen.
const ESCAPE: u8 = 0x01;

/// What the commands are, for people.
pub const HELP: &str = "\
Ctrl-A x  leave: end the virtual machine
Ctrl-A h  this help
Ctrl-A Ctrl-A (or Ctrl-A a)  send Ctrl-A to the guest
Everything else, Ctrl-C included, goes to the guest.";

/// A command to the monitor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// End the virtual machine.
    Leave,
    /// Say what the commands are.
    Help,
}

/// Separates what is typed for the guest from what is typed for the monitor.
#[derive(Debug, Default)]
pub struct Escape {
    pressed: bool,
}

impl Escape {
    /// Takes bytes as they were typed; appends those for the guest to `guest` and returns the commands.
    pub fn filter(&mut self, typed: &[u8], guest: &mut Vec<u8>) -> Vec<Command> {
        let mut commands = Vec::new();
        for &byte in typed {
            if !self.pressed {
                self.pressed = byte == ESCAPE;
                guest.extend((byte != ESCAPE).then_some(byte));
                continue;
            }
            self.pressed = false;
            match byte {
                b'x' | b'X' => commands.push(Command::Leave),
                b'h' | b'H' | b'?' => commands.push(Command::Help),
                ESCAPE | b'a' => guest.push(ESCAPE),
                other => guest.extend([ESCAPE, other]),
            }
        }
        commands
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(pieces: &[&[u8]]) -> (Vec<u8>, Vec<Command>) {
        let (mut escape, mut guest, mut commands) = (Escape::default(), Vec::new(), Vec::new());
        for piece in pieces {
            commands.extend(escape.filter(piece, &mut guest));
        }
        (guest, commands)
    }

    #[test]
    fn ctrl_c_and_all_else_goes_to_the_guest() {
        let all: Vec<u8> = (0..=255).filter(|&b| b != ESCAPE).collect();
        assert_eq!(filter(&[&all]), (all.clone(), vec![]));
    }

    #[test]
    fn commands_follow_the_escape_key_even_in_another_read() {
        let (guest, commands) = filter(&[b"ab\x01", b"h", b"c\x01xd"]);
        assert_eq!(guest, b"abcd");
        assert_eq!(commands, [Command::Help, Command::Leave]);
    }

    #[test]
    fn the_escape_key_itself_can_be_sent() {
        assert_eq!(
            filter(&[b"\x01\x01x\x01a"]),
            (b"\x01x\x01".to_vec(), vec![])
        );
        assert_eq!(filter(&[b"\x01z"]).0, b"\x01z", "no command: both keys");
    }
}
