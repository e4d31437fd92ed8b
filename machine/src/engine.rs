//! Which engine runs the guest, and why.

use std::fmt;
use std::io::ErrorKind;
use std::str::FromStr;

use doppel_memory::Backing;
use raw_cpuid::CpuId;

/// What the user asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EngineChoice {
    /// The fastest that works here.
    #[default]
    Auto,
    /// The reference interpreter.
    Interpret,
    /// Same-ISA binary translation.
    Translate,
    /// Translation of the guest kernel, direct execution of its user code.
    Direct,
    /// Hardware virtualization.
    Kvm,
}

const NAMES: [(&str, EngineChoice); 5] = [
    ("auto", EngineChoice::Auto),
    ("interpret", EngineChoice::Interpret),
    ("translate", EngineChoice::Translate),
    ("direct", EngineChoice::Direct),
    ("kvm", EngineChoice::Kvm),
];

impl FromStr for EngineChoice {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let found = NAMES.iter().find(|(name, _)| *name == s);
        found.map(|(_, choice)| *choice).ok_or_else(|| {
            let names: Vec<_> = NAMES.iter().map(|(name, _)| *name).collect();
            format!("no engine {s:?}: choose {}", names.join(", "))
        })
    }
}

/// An engine that exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EngineKind {
    /// The reference interpreter.
    Interpret,
    /// Same-ISA binary translation.
    Translate,
    /// The same, and direct execution of user code where that is faster.
    Direct,
}

impl EngineKind {
    /// What guest RAM is made of where the user does not say.
    pub fn usual_backing(self) -> Backing {
        match self {
            // The children map it too.
            EngineKind::Direct => Backing::Memfd,
            EngineKind::Interpret | EngineKind::Translate => Backing::Anonymous,
        }
    }
}

impl fmt::Display for EngineKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            EngineKind::Interpret => "interpret",
            EngineKind::Translate => "translate",
            EngineKind::Direct => "direct",
        })
    }
}

/// The engine that was taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selection {
    /// Which one.
    pub engine: EngineKind,
    /// Why this one.
    pub reason: String,
}

impl fmt::Display for Selection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "engine: {} ({})", self.engine, self.reason)
    }
}

/// An engine that cannot be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("engine {engine} cannot be used: {reason}")]
pub struct EngineError {
    /// Its name.
    pub engine: &'static str,
    /// Why not.
    pub reason: String,
}

/// What the host offers to engines.
#[derive(Clone, Debug)]
pub struct Host {
    /// Why translation does not work here, if it does not.
    pub translate: Result<(), String>,
    /// Why direct execution does not work here, if it does not.
    pub direct: Result<(), String>,
    /// Why /dev/kvm cannot be used, if it cannot.
    pub kvm: Result<(), String>,
}

impl Host {
    /// This host, of which is known whether it executes user code directly.
    pub fn probe(direct: Result<(), String>) -> Self {
        Host {
            translate: doppel_translate::supported().map_err(|e| e.to_string()),
            direct,
            kvm: probe_kvm(),
        }
    }
}

/// Says why there is no need to find out, which takes processes, whether user code can be executed directly: the choice does not depend on it, or
/// the guest's RAM is made of something else than direct execution needs.
pub fn check_direct_matters(choice: EngineChoice, backing: Option<Backing>) -> Result<(), String> {
    if !matches!(choice, EngineChoice::Auto | EngineChoice::Direct) {
        return Err("nobody asked for it".to_owned());
    }
    match backing {
        None | Some(Backing::Memfd) => Ok(()),
        Some(_) => Err("guest memory has to be --memory-backing memfd".to_owned()),
    }
}

fn probe_kvm() -> Result<(), String> {
    let device = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm");
    match device {
        Err(e) if e.kind() == ErrorKind::NotFound => Err("there is none".into()),
        Err(e) if e.kind() == ErrorKind::PermissionDenied => Err("no permission".into()),
        Err(e) => Err(e.to_string()),
        Ok(_) if !has_hardware_virtualization() => {
            // A software KVM, which cannot serve an unmodified kernel.
            Err("the processor has neither VMX nor SVM".into())
        }
        Ok(_) => Ok(()),
    }
}

fn has_hardware_virtualization() -> bool {
    let cpuid = CpuId::new();
    cpuid.get_feature_info().is_some_and(|f| f.has_vmx())
        || cpuid
            .get_extended_processor_and_feature_identifiers()
            .is_some_and(|f| f.has_svm())
}

const NOT_BUILT: &str = "it is not built into this version";

/// Takes an engine.
pub fn select(choice: EngineChoice, host: &Host) -> Result<Selection, EngineError> {
    let named = |engine| {
        Ok(Selection {
            engine,
            reason: "as asked for".into(),
        })
    };
    let refused = |engine, reason: &str| {
        Err(EngineError {
            engine,
            reason: reason.into(),
        })
    };
    match choice {
        EngineChoice::Auto => Ok(select_auto(host)),
        EngineChoice::Interpret => named(EngineKind::Interpret),
        EngineChoice::Translate => match &host.translate {
            Ok(()) => named(EngineKind::Translate),
            Err(reason) => refused("translate", reason),
        },
        EngineChoice::Direct => match (&host.translate, &host.direct) {
            (Ok(()), Ok(())) => named(EngineKind::Direct),
            (Err(reason), _) | (_, Err(reason)) => refused("direct", reason),
        },
        EngineChoice::Kvm => match &host.kvm {
            Ok(()) => refused("kvm", NOT_BUILT),
            Err(reason) => refused("kvm", &format!("{NOT_BUILT}, and /dev/kvm: {reason}")),
        },
    }
}

fn select_auto(host: &Host) -> Selection {
    let no_kvm = match &host.kvm {
        Ok(()) => "/dev/kvm is there, but kvm is not built into this version".to_owned(),
        Err(reason) => format!("no usable /dev/kvm: {reason}"),
    };
    match (&host.translate, &host.direct) {
        (Ok(()), Ok(())) => Selection {
            engine: EngineKind::Direct,
            reason: no_kvm,
        },
        (Ok(()), Err(reason)) => Selection {
            engine: EngineKind::Translate,
            reason: format!("{no_kvm}; no direct execution: {reason}"),
        },
        (Err(reason), _) => Selection {
            engine: EngineKind::Interpret,
            reason: format!("{no_kvm}; no translation: {reason}"),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Offer<'a> = Result<(), &'a str>;

    fn host(translate: Offer<'_>, direct: Offer<'_>, kvm: Offer<'_>) -> Host {
        Host {
            translate: translate.map_err(str::to_owned),
            direct: direct.map_err(str::to_owned),
            kvm: kvm.map_err(str::to_owned),
        }
    }

    #[test]
    fn auto_takes_the_fastest_that_works_and_says_why() {
        for (host, line) in [
            (
                host(Ok(()), Ok(()), Err("there is none")),
                "engine: direct (no usable /dev/kvm: there is none)",
            ),
            (
                host(Ok(()), Err("no seccomp"), Err("there is none")),
                "engine: translate (no usable /dev/kvm: there is none; no direct execution: no seccomp)",
            ),
            (
                host(Err("no FSGSBASE"), Ok(()), Err("no permission")),
                "engine: interpret (no usable /dev/kvm: no permission; no translation: no FSGSBASE)",
            ),
        ] {
            let selection = select(EngineChoice::Auto, &host).unwrap();
            assert_eq!(selection.to_string(), line);
        }
    }

    #[test]
    fn what_does_not_exist_is_refused_with_a_reason() {
        let host = host(Err("no XSAVE"), Ok(()), Err("no permission"));
        let refusal = |choice| select(choice, &host).unwrap_err().to_string();
        assert_eq!(
            refusal(EngineChoice::Translate),
            "engine translate cannot be used: no XSAVE"
        );
        assert_eq!(
            refusal(EngineChoice::Direct),
            "engine direct cannot be used: no XSAVE"
        );
        assert!(refusal(EngineChoice::Kvm).contains("no permission"));
        assert!(select(EngineChoice::Interpret, &host).is_ok());
    }

    #[test]
    fn names_are_parsed() {
        for (name, choice) in NAMES {
            assert_eq!(name.parse(), Ok(choice));
        }
        let error = "fast".parse::<EngineChoice>().unwrap_err();
        assert!(error.contains("auto, interpret, translate, direct, kvm"));
    }
}
