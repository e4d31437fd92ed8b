//! Where packages come from: the host's own apt sources, for the release wanted and of the distribution alone.

use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};

/// Parts of a release that a Debian user expects.
const POCKETS: &[&str] = &["", "-updates", "-security", "-backports"];

/// A source as a `.sources` file has it: fields in their order.
type Stanza = Vec<(String, String)>;

/// The release that this host runs.
pub fn host_release() -> Result<String> {
    let text = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let field = |name: &str| {
        let line = text
            .lines()
            .find_map(|l| l.strip_prefix(name)?.strip_prefix('='));
        line.map(|value| value.trim_matches('"').to_owned())
    };
    match (field("ID").as_deref(), field("VERSION_CODENAME")) {
        (Some("debian"), Some(release)) => Ok(release),
        _ => bail!(
            "this host is no Debian, so its package sources are of no use here; name a release (debian:bookworm) and a sources file \
             (--sources FILE)"
        ),
    }
}

/// The sources for `release`: from `file`, as it is, or made from the host's.
pub fn choose(file: Option<&Path>, release: &str) -> Result<String> {
    match file {
        Some(file) => fs::read_to_string(file).with_context(|| file.display().to_string()),
        None => of_host(&host_release()?, release),
    }
}

/// The sources of one suite, such as `trixie` or `bookworm-backports`: where the host has its own release from.
pub fn of_suite(suite: &str) -> Result<String> {
    let host = host_release()?;
    chosen(&host, |stanza| for_suite(stanza, &host, suite))
}

fn of_host(host: &str, release: &str) -> Result<String> {
    chosen(host, |stanza| for_release(stanza, host, release))
}

/// Those stanzas of the host's that `choose` takes, as it changes them.
fn chosen(host: &str, choose: impl Fn(Stanza) -> Option<Stanza>) -> Result<String> {
    let mut stanzas = Vec::new();
    for path in files()? {
        // Files of other people's may be closed to us.
        let Ok(text) = fs::read_to_string(&path) else {
            continue;
        };
        let lines = path.extension().is_none_or(|e| e == "list");
        stanzas.extend(if lines {
            one_line(&text)
        } else {
            deb822(&text)
        });
    }
    let chosen: Vec<String> = stanzas
        .into_iter()
        .filter_map(choose)
        .map(|stanza| written(&stanza))
        .collect();
    if chosen.is_empty() {
        bail!(
            "the host's apt sources (/etc/apt) have none of Debian {host}; name others with --sources FILE"
        );
    }
    Ok(chosen.join("\n"))
}

fn files() -> Result<Vec<PathBuf>> {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    let folder = fs::read_dir("/etc/apt/sources.list.d")
        .into_iter()
        .flatten();
    let mut more: Vec<_> = folder
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect();
    more.retain(|path| {
        path.extension()
            .is_some_and(|e| e == "list" || e == "sources")
    });
    more.sort();
    files.extend(more);
    Ok(files)
}

/// The stanza with the suites of the host's release made those of the one wanted; none where it has none.
fn for_release(mut stanza: Stanza, host: &str, release: &str) -> Option<Stanza> {
    if is_disabled(&stanza) {
        return None;
    }
    let (_, suites) = stanza.iter_mut().find(|(key, _)| key == "Suites")?;
    let wanted = suites.split_whitespace().filter_map(|suite| {
        let pocket = suite.strip_prefix(host)?;
        POCKETS
            .contains(&pocket)
            .then(|| format!("{release}{pocket}"))
    });
    *suites = wanted.collect::<Vec<_>>().join(" ");
    (!suites.is_empty()).then_some(stanza)
}

/// The stanza of the host's release itself with another suite in its place; none of those that have only updates to it.
fn for_suite(mut stanza: Stanza, host: &str, suite: &str) -> Option<Stanza> {
    if is_disabled(&stanza) {
        return None;
    }
    let (_, suites) = stanza.iter_mut().find(|(key, _)| key == "Suites")?;
    if !suites.split_whitespace().any(|s| s == host) {
        return None;
    }
    *suites = suite.to_owned();
    Some(stanza)
}

fn is_disabled(stanza: &Stanza) -> bool {
    let mut fields = stanza.iter();
    fields.any(|(key, value)| key == "Enabled" && value == "no")
}

fn written(stanza: &Stanza) -> String {
    stanza
        .iter()
        .map(|(key, value)| format!("{key}: {value}\n"))
        .collect()
}

/// The stanzas of a `.sources` file.
fn deb822(text: &str) -> Vec<Stanza> {
    let mut stanzas = vec![Stanza::new()];
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        if line.trim().is_empty() {
            stanzas.push(Stanza::new());
        } else if let Some(stanza) = stanzas.last_mut() {
            match (line.split_once(':'), stanza.last_mut()) {
                (_, Some((_, value))) if line.starts_with([' ', '\t']) => {
                    value.push('\n');
                    value.push_str(line);
                }
                (Some((key, value)), _) => stanza.push((key.trim().into(), value.trim().into())),
                _ => {}
            }
        }
    }
    stanzas
}

/// The lines of a sources.list: `deb [option=value …] URI SUITE COMPONENT…`.
fn one_line(text: &str) -> Vec<Stanza> {
    text.lines().filter_map(source_line).collect()
}

fn source_line(line: &str) -> Option<Stanza> {
    let line = line.split('#').next()?.trim();
    let (kind, rest) = line.split_once(char::is_whitespace)?;
    if kind != "deb" {
        return None;
    }
    let rest = rest.trim();
    let (options, rest) = match rest.strip_prefix('[') {
        Some(rest) => rest.split_once(']')?,
        None => ("", rest),
    };
    let mut words = rest.split_whitespace();
    let mut stanza = vec![
        ("Types".to_owned(), kind.to_owned()),
        ("URIs".to_owned(), words.next()?.to_owned()),
        ("Suites".to_owned(), words.next()?.to_owned()),
        ("Components".to_owned(), words.collect::<Vec<_>>().join(" ")),
    ];
    let signed = options
        .split_whitespace()
        .find_map(|o| o.strip_prefix("signed-by="));
    stanza.extend(signed.map(|value| ("Signed-By".to_owned(), value.to_owned())));
    Some(stanza)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCES: &str = "# mine\nTypes: deb\nURIs: http://host.example/debian\nSuites: bookworm bookworm-updates\n\
        Components: main\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n\n\
        Types: deb\nURIs: http://other.example\nSuites: cloud-bookworm\nComponents: main\n\n\
        Enabled: no\nTypes: deb\nURIs: http://off.example\nSuites: bookworm\nComponents: main\n";

    #[test]
    fn the_hosts_sources_are_made_those_of_the_release() {
        let chosen = |text| -> Vec<String> {
            let stanzas = deb822(text).into_iter();
            let chosen = stanzas.filter_map(|s| for_release(s, "bookworm", "trixie"));
            chosen.map(|s| written(&s)).collect()
        };
        let chosen = chosen(SOURCES);
        assert_eq!(chosen.len(), 1, "{chosen:?}");
        assert!(chosen[0].contains("Suites: trixie trixie-updates\n"));
        assert!(chosen[0].contains("Signed-By: /usr"));
    }

    #[test]
    fn a_suite_comes_from_where_the_release_does() {
        let suites = |text| -> Vec<String> {
            let stanzas = deb822(text).into_iter();
            let chosen = stanzas.filter_map(|s| for_suite(s, "bookworm", "bookworm-backports"));
            chosen.map(|s| written(&s)).collect()
        };
        let chosen = suites(SOURCES);
        assert_eq!(chosen.len(), 1, "{chosen:?}");
        assert!(chosen[0].contains("Suites: bookworm-backports\n"));
        let security = "Types: deb\nURIs: http://host.example\nSuites: bookworm-security\n";
        assert!(suites(security).is_empty());
    }

    #[test]
    fn lines_are_read_like_stanzas() {
        let text = "deb [arch=amd64 signed-by=/k.gpg] http://host.example bookworm main contrib # c\n\
            deb-src http://host.example bookworm main\n#deb http://x bookworm main\ndeb http://y bookworm/updates main\n";
        let lines = one_line(text);
        assert_eq!(lines.len(), 2);
        let first = for_release(lines[0].clone(), "bookworm", "bookworm").unwrap();
        assert_eq!(
            written(&first),
            "Types: deb\nURIs: http://host.example\nSuites: bookworm\nComponents: main contrib\nSigned-By: /k.gpg\n"
        );
        assert_eq!(for_release(lines[1].clone(), "bookworm", "bookworm"), None);
    }
}
