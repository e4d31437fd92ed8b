//! Formats of images, and how one is told from another.
//!
//! A raw image is whatever the guest writes, so a guest can make its raw disk begin like an image of another format, with a host file of its
//! choice as backing file. Whoever guesses the format at the next start then hands the guest that file. So a format other than
//! raw is taken on sight, since nothing that Doppel wrote as raw can look so: where raw was only guessed, writes that would make the disk
//! look like another format are refused ([`crate::Raw`]); where raw was said, it has to be said again.

use std::fmt;
use std::str::FromStr;

/// How a disk is stored in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Byte for byte.
    Raw,
    /// QEMU's copy-on-write format, versions 2 and 3.
    Qcow2,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        })
    }
}

impl FromStr for Format {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "raw" => Ok(Format::Raw),
            "qcow2" => Ok(Format::Qcow2),
            _ => Err(format!(
                "unknown image format {name:?}: raw and qcow2 are known"
            )),
        }
    }
}

/// What the first sector of a file looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Look {
    /// Nothing in particular.
    Raw,
    Qcow2,
    /// A format that is known by name only.
    Other(&'static str),
}

/// Beginnings of image formats that QEMU guesses.
const MAGICS: &[(&[u8], Look)] = &[
    (b"QFI\xfb", Look::Qcow2),
    (b"KDMV", Look::Other("vmdk")),
    (b"COWD", Look::Other("vmdk")),
    (b"# Disk DescriptorFile", Look::Other("vmdk")),
    (b"vhdxfile", Look::Other("vhdx")),
    (b"conectix", Look::Other("vpc")),
    (b"QED\0", Look::Other("qed")),
    (b"LUKS\xba\xbe", Look::Other("luks")),
    (b"WithoutFreeSpace", Look::Other("parallels")),
    (b"WithouFreSpacExt", Look::Other("parallels")),
    (b"Bochs Virtual HD Image", Look::Other("bochs")),
    (
        b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop",
        Look::Other("cloop"),
    ),
    (b"<<< ", Look::Other("vdi")),
];

/// What a file that begins with `head` (at least a sector, or the whole file) looks like.
pub(crate) fn look(head: &[u8]) -> Look {
    let found = MAGICS.iter().find(|(magic, _)| head.starts_with(magic));
    found.map_or(Look::Raw, |(_, look)| *look)
}
