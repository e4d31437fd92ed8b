//! The header of a qcow2 image, looked at before the image is trusted to the crate that reads it.
//!
//! Source: QEMU docs/interop/qcow2.rst. Only what decides whether the image can be used, and how large its tables are.

use std::ops::Range;

/// Bytes of a version 2 header, and of the version 3 fields that matter here.
pub(crate) const LEN: usize = 104;
pub(super) const LEN_V2: usize = 72;

/// Bytes of the largest L1 table and refcount table that QEMU opens.
const TABLE_MAX: u64 = 32 << 20;

/// Incompatible features: bit, what to say.
const FEATURES: &[(u32, &str)] = &[
    (
        0,
        "it was not closed in order and its reference counts are out of date; repair it: qemu-img check -r all",
    ),
    (
        1,
        "it is marked as corrupt; repair it: qemu-img check -r all",
    ),
    (2, "its data are in another file, which is not supported"),
    (
        3,
        "it is compressed with zstd, which is not supported; convert it: qemu-img convert -O qcow2",
    ),
    (
        4,
        "it has subclusters (extended L2 entries), which are not supported; convert it: qemu-img convert -O qcow2",
    ),
];

/// What is needed from a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Bytes in a cluster.
    pub cluster_size: u64,
    /// Bytes of the disk.
    pub size: u64,
    /// Bytes of the L1 table, which is held in memory.
    pub l1_len: u64,
}

/// Checks the header of an image of `file_len` bytes that begins with `head`; a sentence says what is wrong.
pub(crate) fn check(head: &[u8], file_len: u64) -> Result<Header, String> {
    let version = field(head, 4, 4)? as u32;
    if !(2..=3).contains(&version) {
        return Err(format!("version {version} of the format is unknown"));
    }
    let bits = field(head, 20, 4)?;
    if !(9..=21).contains(&bits) {
        return Err(format!("clusters of 2^{bits} bytes are not allowed"));
    }
    if field(head, 32, 4)? != 0 {
        return Err("it is encrypted, which is not supported".into());
    }
    if version == 3 {
        features(field(head, 72, 8)?)?;
    } else if head.len() < LEN_V2 {
        return Err(TRUNCATED.into());
    }
    let header = Header {
        version,
        cluster_size: 1 << bits,
        size: field(head, 24, 8)?,
        l1_len: field(head, 36, 4)? * 8,
    };
    tables(head, &header, file_len)?;
    Ok(header)
}

const TRUNCATED: &str = "the file is truncated";

fn features(bits: u64) -> Result<(), String> {
    if let Some((_, what)) = FEATURES.iter().find(|(bit, _)| bits & (1 << bit) != 0) {
        return Err((*what).into());
    }
    match bits {
        0 => Ok(()),
        _ => Err(format!("it needs features that are unknown ({bits:#x})")),
    }
}

fn tables(head: &[u8], header: &Header, file_len: u64) -> Result<(), String> {
    let cluster = header.cluster_size;
    // Each entry of the L1 table stands for an L2 table of one cluster, each entry of which stands for a cluster.
    let covered = cluster * (cluster / 8);
    if header.size.div_ceil(covered) * 8 > header.l1_len {
        return Err("its L1 table is too short for the size of the disk".into());
    }
    let refcount_len = field(head, 56, 4)? * cluster;
    for (name, offset, len) in [
        ("L1 table", field(head, 40, 8)?, header.l1_len),
        ("refcount table", field(head, 48, 8)?, refcount_len),
    ] {
        if len > TABLE_MAX {
            return Err(format!("its {name} is too long"));
        }
        if len > 0 && (offset % cluster != 0 || offset == 0) {
            return Err(format!("its {name} is in the wrong place"));
        }
        if offset.checked_add(len).is_none_or(|end| end > file_len) {
            return Err(format!("{TRUNCATED}: its {name} is missing"));
        }
    }
    if refcount_len == 0 {
        return Err("it has no refcount table".into());
    }
    Ok(())
}

/// The extension that names features, for messages of programs that do not know them.
const FEATURE_NAMES: u64 = 0x6803_f857;
const FEATURE_NAME_LEN: usize = 48;

/// QEMU writes five at most. A cluster of 2 MiB has room for 262,144 empty ones, each of which `imago` reads by itself and keeps.
const EXTENSIONS_MAX: usize = 128;

/// The extensions of a version 3 header, of which `head` is the first cluster: kinds, and where their data are.
fn extensions(head: &[u8]) -> Result<Vec<(u64, Range<usize>)>, String> {
    let mut all = Vec::new();
    let mut at = field(head, 100, 4)? as usize;
    loop {
        let (kind, len) = (field(head, at, 4)?, field(head, at + 4, 4)? as usize);
        let data = at + 8..at + 8 + len;
        if data.end > head.len() {
            return Err("an extension of its header goes beyond the first cluster".into());
        }
        if kind == 0 {
            return Ok(all);
        }
        if all.len() == EXTENSIONS_MAX {
            return Err("its header has too many extensions".into());
        }
        at = data.start + len.next_multiple_of(8);
        all.push((kind, data));
    }
}

fn feature_names(head: &[u8]) -> Result<impl Iterator<Item = Range<usize>> + use<>, String> {
    let all = extensions(head)?.into_iter();
    Ok(all.filter_map(|(kind, data)| (kind == FEATURE_NAMES).then_some(data)))
}

/// Checks the extensions of a version 3 header, of which `head` is the first cluster: `imago` 0.2 panics at a feature's name that is cut off.
pub(crate) fn check_extensions(head: &[u8]) -> Result<(), String> {
    let is_whole = |data: Range<usize>| data.len().is_multiple_of(FEATURE_NAME_LEN);
    match feature_names(head)?.all(is_whole) {
        true => Ok(()),
        false => Err("its table of feature names is cut off".into()),
    }
}

/// Puts the names of features, which `imago` writes in whatever order, into that of their numbers, so that equal images are equal byte for byte.
/// `head` is the first cluster of a version 3 image.
pub(crate) fn sort_feature_names(head: &mut [u8]) -> Result<(), String> {
    for data in feature_names(head)? {
        let data = &mut head[data];
        let mut names: Vec<_> = data.chunks(FEATURE_NAME_LEN).map(<[u8]>::to_vec).collect();
        names.sort();
        data.copy_from_slice(&names.concat());
    }
    Ok(())
}

/// A big-endian number in a header.
pub(super) fn field(head: &[u8], at: usize, len: usize) -> Result<u64, String> {
    let bytes = head.get(at..at + len).ok_or(TRUNCATED)?;
    Ok(bytes.iter().fold(0, |n, byte| n << 8 | u64::from(*byte)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image() -> Vec<u8> {
        let mut head = b"QFI\xfb\0\0\0\x03".to_vec();
        head.resize(LEN, 0);
        put(&mut head, 20, 4, 16);
        put(&mut head, 24, 8, 1 << 30);
        put(&mut head, 36, 4, 2);
        put(&mut head, 40, 8, 3 << 16);
        put(&mut head, 48, 8, 1 << 16);
        put(&mut head, 56, 4, 1);
        head
    }

    fn put(head: &mut [u8], at: usize, len: usize, value: u64) {
        head[at..at + len].copy_from_slice(&value.to_be_bytes()[8 - len..]);
    }

    const FILE: u64 = 4 << 16;

    #[test]
    fn a_good_header_passes() {
        let header = check(&image(), FILE).unwrap();
        assert_eq!((header.cluster_size, header.size), (1 << 16, 1 << 30));
    }

    #[test]
    fn extensions_end_and_names_are_whole() {
        let with = |extensions: &[(u64, u64)]| {
            let mut head = image();
            put(&mut head, 100, 4, LEN as u64);
            head.resize(4096, 0);
            let mut at = LEN;
            for (kind, len) in extensions {
                put(&mut head, at, 4, *kind);
                put(&mut head, at + 4, 4, *len);
                at += 8 + (*len as usize).next_multiple_of(8);
            }
            check_extensions(&head)
        };
        assert_eq!(with(&[(0xe279_2aca, 5), (FEATURE_NAMES, 96)]), Ok(()));
        for cut in [1, 47, 49, 95] {
            let error = with(&[(0x1234, 3), (FEATURE_NAMES, cut)]).unwrap_err();
            assert!(error.contains("feature names"), "{error}");
        }
        for len in [4096 - LEN as u64, u64::from(u32::MAX)] {
            let error = with(&[(0x1234, len)]).unwrap_err();
            assert!(error.contains("beyond"), "{error}");
        }
        let error = with(&[(0x1234, 0); 256]).unwrap_err();
        assert!(error.contains("too many"), "{error}");
    }

    #[test]
    fn each_bad_field_is_named() {
        for (at, len, value, says) in [
            (4, 4, 4, "version 4"),
            (20, 4, 8, "clusters of 2^8"),
            (20, 4, 64, "clusters of 2^64"),
            (24, 8, u64::MAX, "too short"),
            (32, 4, 1, "encrypted"),
            (36, 4, 0, "too short"),
            (36, 4, u64::from(u32::MAX), "too long"),
            (40, 8, 3, "wrong place"),
            (40, 8, 0, "wrong place"),
            (40, 8, 4 << 16, "L1 table is missing"),
            (48, 8, 9 << 16, "refcount table is missing"),
            (56, 4, u64::from(u32::MAX), "too long"),
            (56, 4, 0, "no refcount table"),
            (72, 8, 1, "-r all"),
            (72, 8, 2, "corrupt"),
            (72, 8, 8, "zstd"),
            (72, 8, 1 << 40, "unknown"),
        ] {
            let mut head = image();
            put(&mut head, at, len, value);
            let error = check(&head, FILE).unwrap_err();
            assert!(error.contains(says), "{at}: {error}");
        }
        for len in 0..LEN_V2 + 8 {
            assert!(check(&image()[..len], FILE).is_err(), "{len}");
        }
    }
}
