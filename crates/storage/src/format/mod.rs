//! Formats of images.

use std::{fmt, io, rc::Rc, str::FromStr};

use crate::{OpenError, layer::Layer, runtime::LocalFuture};

pub mod overlay;
pub mod probe;
pub mod qcow2;
pub mod raw;
pub mod vhd;
pub mod vhdx;
pub mod vmdk;

/// How an image is laid out in its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// The disk's bytes as they are.
    Raw,
    /// QEMU's copy-on-write format, versions 2 and 3.
    Qcow2,
    /// Microsoft's older format: fixed, dynamic or differencing.
    Vhd,
    /// Microsoft's newer format: fixed, dynamic or differencing.
    Vhdx,
    /// VMware's format, read only.
    Vmdk,
}

impl Format {
    /// All formats.
    pub const ALL: [Self; 5] = [Self::Raw, Self::Qcow2, Self::Vhd, Self::Vhdx, Self::Vmdk];

    /// The name that people write.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vhd => "vhd",
            Self::Vhdx => "vhdx",
            Self::Vmdk => "vmdk",
        }
    }

    /// Opens an image of this format in `file`.
    pub(crate) async fn open(
        self,
        file: Rc<dyn Layer>,
        write: bool,
        opener: &dyn Opener,
    ) -> Result<Rc<dyn Layer>, FormatError> {
        Ok(match self {
            Self::Raw => Rc::new(raw::Raw::new(file, write)),
            Self::Qcow2 => Rc::new(qcow2::Qcow2::open(file, write, opener).await?),
            Self::Vhd => Rc::new(vhd::Vhd::open(file, write, opener).await?),
            Self::Vhdx => Rc::new(vhdx::Vhdx::open(file, write, opener).await?),
            Self::Vmdk => Rc::new(vmdk::Vmdk::open(file, write, opener).await?),
        })
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|format| format.name() == text);
        found.ok_or_else(|| {
            let known = Self::ALL.map(Self::name).join(", ");
            format!("\"{text}\" is not a format of images; known are {known}")
        })
    }
}

/// Why an image does not open.
#[derive(Debug)]
pub enum FormatError {
    /// Reading failed.
    Io(io::Error),
    /// It is damaged, or has something that is not supported.
    Refused(String),
    /// A file that it names does not open.
    Below(Box<OpenError>),
}

impl From<io::Error> for FormatError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::InvalidData => Self::Refused(error.to_string()),
            _ => Self::Io(error),
        }
    }
}

impl fmt::Display for FormatError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(error) => error.fmt(f),
            Self::Refused(why) => f.write_str(why),
            Self::Below(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for FormatError {}

/// The error of an image that is not used.
pub(crate) fn refused(why: impl Into<String>) -> FormatError {
    FormatError::Refused(why.into())
}

/// Opens files that an image names.
pub trait Opener {
    /// Opens the backing file `name`, for reading.
    fn open<'a>(
        &'a self,
        name: &'a str,
        format: Option<Format>,
    ) -> LocalFuture<'a, Result<Rc<dyn Layer>, FormatError>>;
}

/// Opens nothing.
pub struct NoOthers;

impl Opener for NoOthers {
    fn open<'a>(
        &'a self,
        name: &'a str,
        _: Option<Format>,
    ) -> LocalFuture<'a, Result<Rc<dyn Layer>, FormatError>> {
        Box::pin(async move { Err(refused(format!("it needs another file, \"{name}\""))) })
    }
}
