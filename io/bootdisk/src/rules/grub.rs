//! The default entry of a grub.cfg.
//!
//! GRUB's configuration is a script, and to read it rightly in general is to run it. What `grub-mkconfig` writes is regular: blocks
//! `menuentry 'TITLE' … { … linux PATH OPTIONS … initrd PATH … }`, some within `submenu` blocks, and a `set default=` that is a
//! number, a title or an identifier, or comes from grubenv. That much is read here; where it does not lead to files that are there,
//! the next rule has its turn.

use super::{Choice, locate, without_variables};
use crate::volume::Volume;

const FOLDERS: &[&str] = &["/boot/grub", "/grub", "/boot/grub2", "/grub2"];
/// Blocks within blocks that are followed.
const DEPTH_MAX: usize = 16;

/// What GRUB would boot.
pub fn choose(volumes: &[Volume]) -> Option<Choice> {
    for (number, volume) in volumes.iter().enumerate() {
        for folder in FOLDERS {
            let Some(text) = volume.text(&format!("{folder}/grub.cfg")) else {
                continue;
            };
            let environment = volume.text(&format!("{folder}/grubenv"));
            let menu = Menu::parse(&text, &environment.unwrap_or_default());
            let choice = menu
                .default()
                .and_then(|entry| entry.choice(volumes, number));
            if choice.is_some() {
                return choice;
            }
        }
    }
    None
}

#[derive(Debug, Default)]
struct Menu {
    entries: Vec<Entry>,
    default: String,
}

#[derive(Debug, Default)]
struct Entry {
    title: String,
    id: String,
    linux: Option<(String, String)>,
    initrds: Vec<String>,
    below: Vec<Entry>,
}

impl Menu {
    fn parse(text: &str, environment: &str) -> Menu {
        let mut lines = text.lines().map(split);
        let mut default = String::new();
        let entries = block(&mut lines, &mut default, DEPTH_MAX, &mut Entry::default());
        if default.contains("saved_entry") {
            default = saved(environment);
        }
        Menu { entries, default }
    }

    /// `default` is a path of entries with `>` between: each a number, a title or an identifier. The first where it names none.
    fn default(&self) -> Option<&Entry> {
        let mut entries = &self.entries;
        let mut found = None;
        for step in self.default.split('>') {
            let Some(entry) = named(entries, step.trim()) else {
                break;
            };
            found = Some(entry);
            entries = &entry.below;
        }
        first_to_boot(found.map_or(&self.entries[..], std::slice::from_ref))
            .or_else(|| first_to_boot(&self.entries))
    }
}

fn named<'a>(entries: &'a [Entry], name: &str) -> Option<&'a Entry> {
    match name.parse::<usize>() {
        Ok(number) => entries.get(number),
        Err(_) => entries.iter().find(|e| e.title == name || e.id == name),
    }
}

fn first_to_boot(entries: &[Entry]) -> Option<&Entry> {
    entries.iter().find_map(|entry| match entry.linux {
        Some(_) => Some(entry),
        None => first_to_boot(&entry.below),
    })
}

/// `saved_entry=` in a grubenv.
fn saved(environment: &str) -> String {
    let mut lines = environment.lines();
    let found = lines.find_map(|line| line.strip_prefix("saved_entry="));
    found.unwrap_or_default().to_owned()
}

type Words = Vec<String>;

/// Reads to the end of a block: the entries in it, and into `own` what it boots itself.
fn block(
    lines: &mut impl Iterator<Item = Words>,
    default: &mut String,
    depth: usize,
    own: &mut Entry,
) -> Vec<Entry> {
    let mut entries = Vec::new();
    while let Some(words) = lines.next() {
        let first = words.first().map_or("", String::as_str);
        let opens = words.last().is_some_and(|word| word == "{");
        match first {
            "menuentry" | "submenu" if opens && depth > 0 => {
                let mut entry = Entry {
                    title: words.get(1).cloned().unwrap_or_default(),
                    id: identifier(&words),
                    ..Entry::default()
                };
                entry.below = block_of(lines, default, depth, &mut entry);
                entries.push(entry);
            }
            "}" => break,
            _ if opens && depth > 0 => {
                entries.extend(block(lines, default, depth - 1, own));
            }
            "linux" | "linuxefi" | "linux16" if words.len() > 1 => {
                own.linux = Some((words[1].clone(), words[2..].join(" ")));
            }
            "initrd" | "initrdefi" | "initrd16" => own.initrds = words[1..].to_vec(),
            "set" => set(&words, default),
            _ => {}
        }
    }
    entries
}

fn block_of(
    lines: &mut impl Iterator<Item = Words>,
    default: &mut String,
    depth: usize,
    entry: &mut Entry,
) -> Vec<Entry> {
    block(lines, default, depth - 1, entry)
}

/// `set default="…"`. Of several (one for the next boot alone, one for when nothing is known), the last that says something counts.
fn set(words: &Words, default: &mut String) {
    let value = words.get(1).and_then(|word| word.strip_prefix("default="));
    if let Some(value) = value.filter(|value| !value.contains("next_entry")) {
        *default = value.to_owned();
    }
}

/// The word after `--id` or `$menuentry_id_option`.
fn identifier(words: &Words) -> String {
    let is_option = |word: &String| word == "--id" || word == "$menuentry_id_option";
    let at = words.iter().position(is_option);
    let word = at.and_then(|at| words.get(at + 1));
    word.cloned().unwrap_or_default()
}

/// The words of a line, without quotation marks and comments.
fn split(line: &str) -> Words {
    let mut words = Words::new();
    let mut word: Option<String> = None;
    let mut quote = None;
    let mut characters = line.chars();
    while let Some(c) = characters.next() {
        match (quote, c) {
            (Some(q), c) if c == q => quote = None,
            (None, '\'' | '"') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (None | Some('"'), '\\') => word.get_or_insert_default().extend(characters.next()),
            (None, '#') if word.is_none() => break,
            (None, c) if c.is_whitespace() => words.extend(word.take()),
            (_, c) => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}

impl Entry {
    fn choice(&self, volumes: &[Volume], number: usize) -> Option<Choice> {
        let (kernel, options) = self.linux.as_ref()?;
        let initrds = self
            .initrds
            .iter()
            .map(|path| locate(volumes, number, path));
        Some(Choice {
            kernel: locate(volumes, number, kernel)?,
            initrds: initrds.collect::<Option<_>>()?,
            options: without_variables(options),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As `update-grub` writes it, shortened.
    const DEBIAN: &str = r#"
if [ "${next_entry}" ] ; then
   set default="${next_entry}"
   set next_entry=
else
   set default="DEFAULT"
fi
function load_video {
  if [ x$feature_all_video_module = xy ]; then
    insmod all_video
  fi
}
menuentry 'Debian GNU/Linux' --class debian $menuentry_id_option 'gnulinux-simple-11' {
	load_video
	if [ x$grub_platform = xxen ]; then insmod xzio; fi
	search --no-floppy --fs-uuid --set=root 11
	echo	'Loading Linux 6.1.0-9 ...'
	linux	/boot/vmlinuz-6.1.0-9 root=UUID=11 ro "quiet" $vt_handoff # what
	initrd	/boot/initrd.img-6.1.0-9
}
submenu 'Advanced options' $menuentry_id_option 'gnulinux-advanced-11' {
	menuentry 'Debian, 6.1.0-9' --class debian $menuentry_id_option 'gnulinux-6.1.0-9-advanced-11' {
		linux	/boot/vmlinuz-6.1.0-9 root=UUID=11 ro quiet
	}
	menuentry 'Debian, it'\''s 6.1.0-8' --class debian $menuentry_id_option 'gnulinux-6.1.0-8-advanced-11' {
		linux	/boot/vmlinuz-6.1.0-8 root=UUID=11 ro quiet
		initrd	/boot/a /boot/b
	}
}
"#;

    fn booted(default: &str, environment: &str) -> String {
        let menu = Menu::parse(&DEBIAN.replace("DEFAULT", default), environment);
        menu.default().unwrap().linux.clone().unwrap().0
    }

    #[test]
    fn the_default_entry_is_found_by_number_title_and_identifier() {
        let (new, old) = ("/boot/vmlinuz-6.1.0-9", "/boot/vmlinuz-6.1.0-8");
        assert_eq!(booted("0", ""), new);
        assert_eq!(booted("1>1", ""), old);
        assert_eq!(booted("1", ""), new);
        assert_eq!(booted("Advanced options>Debian, it's 6.1.0-8", ""), old);
        assert_eq!(
            booted("gnulinux-advanced-11>gnulinux-6.1.0-8-advanced-11", ""),
            old
        );
        assert_eq!(booted("7", ""), new);
        assert_eq!(
            booted("${saved_entry}", "# GRUB\nsaved_entry=1>1\n###"),
            old
        );
        assert_eq!(booted("${saved_entry}", ""), new);
    }

    #[test]
    fn options_and_ram_disks_are_read() {
        let menu = Menu::parse(&DEBIAN.replace("DEFAULT", "0"), "");
        let first = &menu.entries[0];
        let options = &first.linux.as_ref().unwrap().1;
        assert_eq!(
            without_variables(options.split(" #").next().unwrap()),
            "root=UUID=11 ro quiet"
        );
        assert_eq!(first.initrds, ["/boot/initrd.img-6.1.0-9"]);
        assert_eq!(menu.entries[1].below[1].initrds, ["/boot/a", "/boot/b"]);
    }

    #[test]
    fn no_text_crashes_or_hangs() {
        for end in 0..DEBIAN.len() {
            if DEBIAN.is_char_boundary(end) {
                Menu::parse(&DEBIAN[..end], "").default();
                Menu::parse(&DEBIAN[end..], "").default();
            }
        }
        let deep = "menuentry 'a' {\n".repeat(100_000);
        Menu::parse(&deep, "").default();
    }
}
