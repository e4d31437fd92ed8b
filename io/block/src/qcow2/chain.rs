//! Images that stand on images: how a chain of backing files is opened, and how a new one is put on top.
//!
//! A backing file is only read, and locked against writers. Its name and format come from the header of the image above. Where no format
//! is named it is guessed, and a guess may be what a guest wrote to its raw disk, so that an image that was only guessed to be
//! qcow2 may not name further files (see [`crate::Format`]).

use std::fs;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use imago::format::builder::{FormatCreateBuilder, FormatDriverBuilder};
use imago::{DenyImplicitOpenGate, FormatAccess};

use super::Qcow2;
use super::gate::Gate;
use super::header::{self, Header};
use super::refcounts;
use super::storage_unsafe::ImageFile;
use crate::backend::SECTOR;
use crate::create::settle;
use crate::error::BlockError;
use crate::file::HostFile;
use crate::format::{Format, Look, look};

type Driver = imago::qcow2::Qcow2<ImageFile>;

/// Bytes at the start of a new image that its header has room in, a part of its first cluster.
const HEAD_MAX: usize = 4096;

/// What there may be below an image, itself included.
#[derive(Clone, Copy)]
struct Room {
    images: usize,
    /// Bytes of L1 tables, all of which are held in memory.
    tables: u64,
}

impl Room {
    /// QEMU has no bound; nobody has so many.
    const MAX: Room = Room {
        images: 64,
        tables: 128 << 20,
    };

    /// What is left below an image.
    fn below(self, path: &Path, header: &Header) -> Result<Room, BlockError> {
        let images = self.images.checked_sub(1);
        let tables = self.tables.checked_sub(header.l1_len);
        match (images, tables) {
            (Some(images), Some(tables)) => Ok(Room { images, tables }),
            (None, _) => Err(damaged(path, "too many images stand on each other")),
            (_, None) => Err(damaged(
                path,
                "the L1 tables of the images that stand on each other are too long together",
            )),
        }
    }
}

/// An open image with all that is below it.
pub(crate) struct Chain {
    pub file: Arc<HostFile>,
    pub image: FormatAccess<ImageFile>,
    pub format: Format,
    /// What the header says of the backing file.
    pub backing: Option<Backing>,
    /// Of a qcow2 image its header, and what decides about writes to that.
    pub(super) open: Option<(Header, Gate)>,
}

/// A backing file as an image names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backing {
    /// As it stands in the header.
    pub name: String,
    /// Where that is, seen from the image.
    pub path: PathBuf,
    /// Its format where the header says it.
    pub format: Option<String>,
}

/// Opens a qcow2 image and all below it.
pub(crate) fn open(file: HostFile) -> Result<Qcow2, BlockError> {
    let path = file.path().to_owned();
    let chain = open_qcow2(file, Below::Named, Room::MAX)?;
    finish(chain, &path)
}

/// Opens a qcow2 image that stands on `base`.
pub(crate) fn open_over(file: HostFile, base: Chain) -> Result<Qcow2, BlockError> {
    let path = file.path().to_owned();
    let chain = open_qcow2(file, Below::Given(Box::new(base)), Room::MAX)?;
    finish(chain, &path)
}

fn finish(chain: Chain, path: &Path) -> Result<Qcow2, BlockError> {
    match chain.open.clone() {
        Some((header, gate)) => Ok(Qcow2::new(chain, header, gate)),
        None => Err(damaged(path, "it has no header")),
    }
}

/// Where the backing file of an image comes from.
enum Below {
    /// From its header.
    Named,
    /// From its header, which must not name one.
    Nothing,
    /// From the caller, and the header must name the same.
    Given(Box<Chain>),
}

impl Chain {
    /// Opens an image of any format for reading, and all below it.
    pub fn open(path: &Path, format: Option<Format>) -> Result<Chain, BlockError> {
        open_chain(path, format, Below::Named, Room::MAX)
    }

    /// What the header of a qcow2 image says.
    pub fn header(&self) -> Option<Header> {
        self.open.as_ref().map(|(header, _)| *header)
    }

    /// Bytes of the disk, whole sectors.
    pub fn disk_len(&self) -> u64 {
        self.image.size().next_multiple_of(SECTOR)
    }
}

fn open_chain(
    path: &Path,
    format: Option<Format>,
    below: Below,
    room: Room,
) -> Result<Chain, BlockError> {
    let file = HostFile::open(path, false)?;
    let found = look(&file.head(SECTOR as usize)?);
    match (format, found) {
        (Some(Format::Raw), _) | (None, Look::Raw) => open_raw(file),
        (Some(Format::Qcow2), _) | (None, Look::Qcow2) => open_qcow2(file, below, room),
        (None, Look::Other(name)) => Err(BlockError::Unsupported {
            path: path.to_owned(),
            name,
        }),
    }
}

fn open_raw(file: HostFile) -> Result<Chain, BlockError> {
    let file = Arc::new(file);
    let storage = ImageFile::new(file.clone(), SECTOR);
    let raw = imago::raw::Raw::open_image(storage, false).map_err(BlockError::io(file.path()))?;
    Ok(Chain {
        image: FormatAccess::new(raw),
        file,
        format: Format::Raw,
        backing: None,
        open: None,
    })
}

fn open_qcow2(file: HostFile, below: Below, room: Room) -> Result<Chain, BlockError> {
    let path = file.path().to_owned();
    let head = file.head(header::LEN)?;
    if look(&head) != Look::Qcow2 {
        return Err(damaged(&path, "it does not begin as one"));
    }
    let header = header::check(&head, file.len()).map_err(|what| damaged(&path, what))?;
    let room = room.below(&path, &header)?;
    if header.version == 3 {
        let mut cluster = vec![0; header.cluster_size as usize];
        file.read_at(0, vec![IoSliceMut::new(&mut cluster)])
            .map_err(BlockError::io(&path))?;
        header::check_extensions(&cluster).map_err(|what| damaged(&path, what))?;
    }
    if file.writable() {
        let read = |at, into: &mut [u8]| file.read_at(at, vec![IoSliceMut::new(into)]).map(drop);
        refcounts::check(&head, file.len(), &read).map_err(|what| damaged(&path, what))?;
    }
    let file = Arc::new(file);
    let storage = ImageFile::new(file.clone(), header.cluster_size);
    let gate = storage.gate();
    let mut driver =
        Driver::open_image(storage, file.writable()).map_err(|error| unreadable(&path, error))?;
    gate.close(&head, header.cluster_size)
        .map_err(|what| damaged(&path, what))?;
    driver.set_data_file(None);
    let backing = backing_of(&driver, &path);
    let image = open_below(&path, backing.as_ref(), below, room)?;
    driver.set_backing(image);
    Ok(Chain {
        file,
        image: FormatAccess::new(driver),
        format: Format::Qcow2,
        backing,
        open: Some((header, gate)),
    })
}

fn open_below(
    path: &Path,
    backing: Option<&Backing>,
    below: Below,
    room: Room,
) -> Result<Option<FormatAccess<ImageFile>>, BlockError> {
    match (backing, below) {
        (None, Below::Named | Below::Nothing) => Ok(None),
        (None, Below::Given(_)) => Err(BlockError::OtherBase {
            path: path.to_owned(),
            base: "nothing".into(),
        }),
        (Some(backing), Below::Given(base)) if backing.is(base.file.path()) => Ok(Some(base.image)),
        (Some(backing), Below::Given(_)) => Err(BlockError::OtherBase {
            path: path.to_owned(),
            base: backing.name.clone(),
        }),
        (Some(backing), Below::Nothing) => Err(damaged(
            path,
            format!(
                "it names the backing file {}, but the image above does not say that this is a qcow2 image; say it: \
                 qemu-img rebase -u -F qcow2 -b {} IMAGE",
                backing.name,
                path.display()
            ),
        )),
        (Some(backing), Below::Named) => open_named(path, backing, room).map(Some),
    }
}

fn open_named(
    path: &Path,
    backing: &Backing,
    room: Room,
) -> Result<FormatAccess<ImageFile>, BlockError> {
    let format = match backing.format.as_deref() {
        None => None,
        Some("raw" | "file") => Some(Format::Raw),
        Some("qcow2") => Some(Format::Qcow2),
        Some(name) => {
            let what =
                format!("its backing file is of the format {name:?}, which is not supported");
            return Err(damaged(path, what));
        }
    };
    let below = match format {
        Some(_) => Below::Named,
        None => Below::Nothing,
    };
    let chain = open_chain(&backing.path, format, below, room);
    Ok(chain.map_err(|error| below_error(path, error))?.image)
}

/// An error about a backing file says whose it is.
fn below_error(path: &Path, error: BlockError) -> BlockError {
    BlockError::Below {
        path: path.to_owned(),
        source: Box::new(error),
    }
}

fn backing_of(driver: &Driver, path: &Path) -> Option<Backing> {
    let name = driver.implicit_backing_file()?.clone();
    let file = name.strip_prefix("file:").unwrap_or(&name);
    let folder = path.parent().unwrap_or(Path::new(""));
    Some(Backing {
        path: folder.join(file),
        format: driver.implicit_backing_format().cloned(),
        name,
    })
}

impl Backing {
    /// Whether this is the file at `path`.
    fn is(&self, path: &Path) -> bool {
        let identity = |path: &Path| fs::metadata(path).map(|m| (m.dev(), m.ino())).ok();
        identity(&self.path).is_some_and(|own| Some(own) == identity(path))
    }
}

/// Makes an empty image for a disk of `size` bytes.
pub(crate) fn create(path: &Path, size: u64) -> Result<(), BlockError> {
    make(path, |storage| {
        Driver::create_builder(storage).size(size).create()
    })
}

/// Makes an empty image that stands on `base`.
pub(crate) fn create_over(path: &Path, base: &Chain) -> Result<(), BlockError> {
    let full = fs::canonicalize(base.file.path()).map_err(BlockError::io(base.file.path()))?;
    let name = full.into_os_string().into_string().map_err(|_| {
        BlockError::Usage("a disk below an overlay needs a name that is UTF-8".into())
    })?;
    let (size, format) = (base.disk_len(), base.format.to_string());
    make(path, |storage| {
        Driver::create_builder(storage)
            .backing(name, format)
            .size(size)
            .create_open(DenyImplicitOpenGate::default(), |image| {
                Ok(Driver::builder(image).backing(None).write(true))
            })
            .and_then(|driver| FormatAccess::new(driver).flush())
    })
}

/// Makes an image beside its place and moves it there, so that it is never there by half; it must not be there yet.
fn make(path: &Path, format: impl FnOnce(ImageFile) -> io::Result<()>) -> Result<(), BlockError> {
    let mut work = path.as_os_str().to_owned();
    work.push(format!(".partial-{}", std::process::id()));
    let work = PathBuf::from(work);
    let file = Arc::new(HostFile::create(&work).map_err(|error| at(path, error))?);
    let storage = ImageFile::new(file.clone(), SECTOR);
    let result = format(storage)
        .and_then(|()| sort_feature_names(&file))
        .and_then(|()| file.sync())
        .and_then(|()| settle(&work, path))
        .map_err(BlockError::io(path));
    if result.is_err() {
        let _ = fs::remove_file(&work);
    }
    result
}

fn sort_feature_names(file: &HostFile) -> io::Result<()> {
    let mut head = vec![0; HEAD_MAX];
    file.read_at(0, vec![IoSliceMut::new(&mut head)])?;
    header::sort_feature_names(&mut head).map_err(io::Error::other)?;
    file.write_at(0, vec![IoSlice::new(&head)])
}

/// The same error about the file that the user named.
fn at(path: &Path, error: BlockError) -> BlockError {
    match error {
        BlockError::Io { source, .. } => BlockError::io(path)(source),
        other => other,
    }
}

fn damaged(path: &Path, what: impl Into<String>) -> BlockError {
    BlockError::Damaged {
        path: path.to_owned(),
        format: Format::Qcow2,
        what: what.into(),
    }
}

/// What the crate says of an image: an error of the host, or of what is in it.
fn unreadable(path: &Path, error: io::Error) -> BlockError {
    match error.raw_os_error() {
        Some(_) => BlockError::io(path)(error),
        None => damaged(path, error.to_string()),
    }
}
