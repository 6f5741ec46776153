//! What apt's package list says of a package, from `apt-cache show` (deb-control(5) paragraphs).

use crate::error::ImageError;
use std::path::Path;

/// The largest package that is fetched, in bytes.
const MAX_PACKAGE: u64 = 2 << 30;

/// One package in one version.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Record {
    /// Its name.
    pub(crate) name: String,
    /// Its version.
    pub(crate) version: String,
    /// `amd64` or `all`.
    pub(crate) architecture: String,
    /// The package file's size, in bytes.
    pub(crate) size: u64,
    /// The unpacked size, in bytes.
    pub(crate) installed_size: u64,
    /// The package file's SHA-256, lower-case hexadecimal.
    pub(crate) sha256: String,
    /// The names of the packages that it depends on, first alternatives only.
    pub(crate) depends: Vec<String>,
}

impl Record {
    /// The name under which the package file is kept.
    pub(crate) fn file_name(&self) -> String {
        format!(
            "{}_{}_{}.deb",
            self.name,
            self.version.replace(':', "%3a"),
            self.architecture
        )
    }
}

/// Refuses what cannot be a package name (Debian Policy 5.6.1), before it becomes an argument or
/// a file name.
pub(crate) fn check_name(name: &str) -> Result<(), ImageError> {
    let good = name.len() >= 2
        && name.len() <= 128
        && name.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
        && name
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"+-.".contains(&b));
    if good {
        Ok(())
    } else {
        Err(ImageError::BadPackageName {
            name: name.chars().take(80).collect(),
        })
    }
}

fn is_version(version: &str) -> bool {
    !version.is_empty()
        && version.len() <= 128
        && version.starts_with(|c: char| c.is_ascii_alphanumeric())
        && version
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b".+-:~".contains(&b))
}

/// Reads the paragraphs of `text`. Of several for one package, the first counts.
pub(crate) fn parse_records(text: &str) -> Result<Vec<Record>, ImageError> {
    let mut records: Vec<Record> = Vec::new();
    for paragraph in text.split("\n\n") {
        if paragraph.trim().is_empty() {
            continue;
        }
        let record = parse_record(paragraph)?;
        if !records.iter().any(|known| known.name == record.name) {
            records.push(record);
        }
    }
    Ok(records)
}

fn parse_record(paragraph: &str) -> Result<Record, ImageError> {
    let field = |name: &str| {
        paragraph
            .lines()
            .filter_map(|line| line.split_once(':'))
            .find(|(key, _)| key.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.trim())
    };
    let name = field("Package").unwrap_or_default();
    check_name(name)?;
    let broken = |what: &str| {
        ImageError::malformed(
            Path::new("apt-cache show"),
            format!("the record of package {name} has no usable {what}"),
        )
    };
    let version = field("Version")
        .filter(|version| is_version(version))
        .ok_or_else(|| broken("Version"))?;
    let architecture = field("Architecture")
        .filter(|found| ["amd64", "all"].contains(found))
        .ok_or_else(|| broken("Architecture"))?;
    let size = field("Size")
        .and_then(|size| size.parse().ok())
        .filter(|&size| size <= MAX_PACKAGE)
        .ok_or_else(|| broken("Size"))?;
    let sha256 = field("SHA256")
        .map(str::to_ascii_lowercase)
        .filter(|sum| sum.len() == 64 && sum.bytes().all(|byte| byte.is_ascii_hexdigit()))
        .ok_or_else(|| broken("SHA256"))?;
    let installed_kib: u64 = field("Installed-Size")
        .and_then(|size| size.parse().ok())
        .unwrap_or(0);
    let depends = ["Pre-Depends", "Depends"]
        .iter()
        .filter_map(|name| field(name))
        .flat_map(|list| list.split(','))
        .filter_map(|entry| {
            let first = entry.split('|').next()?.trim();
            let name = first.split([' ', '(', ':']).next()?;
            check_name(name).ok().map(|()| name.to_owned())
        })
        .collect();
    Ok(Record {
        name: name.to_owned(),
        version: version.to_owned(),
        architecture: architecture.to_owned(),
        size,
        installed_size: installed_kib.saturating_mul(1024),
        sha256,
        depends,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SUM: &str = "00be21c0c17f08ddf26e82d3b53fe7a41efa4a288938da6bb69e89c4b25c281d";

    fn paragraph(name: &str, version: &str) -> String {
        format!(
            "Package: {name}\nVersion: {version}\nInstalled-Size: 13\nArchitecture: amd64\n\
             Depends: linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2), a1:any | b2, c3\n\
             Description: Linux\n a second line: with a colon\nSize: 1504\nSHA256: {SUM}\n"
        )
    }

    #[test]
    fn reads_what_apt_prints() {
        let text = format!(
            "{}\n{}",
            paragraph("linux-image-cloud-amd64", "1:6.1.192-2"),
            paragraph("linux-image-cloud-amd64", "6.0")
        );
        let records = parse_records(&text).unwrap();
        assert_eq!(records.len(), 1);
        let record = &records[0];
        assert_eq!(record.version, "1:6.1.192-2");
        assert_eq!((record.size, record.installed_size), (1504, 13 * 1024));
        assert_eq!(
            record.depends,
            ["linux-image-6.1.0-56-cloud-amd64", "a1", "c3"]
        );
        assert_eq!(
            record.file_name(),
            "linux-image-cloud-amd64_1%3a6.1.192-2_amd64.deb"
        );
    }

    #[test]
    fn names_and_versions_cannot_leave_the_cache() {
        for name in ["../../etc", "-o", "a/b", "A", "", "a", "x\ny", ".hidden"] {
            assert!(check_name(name).is_err(), "{name:?}");
            assert!(parse_records(&paragraph(name, "1.0")).is_err(), "{name:?}");
        }
        for version in ["../1", "", "/", "1 2"] {
            assert!(parse_records(&paragraph("aa", version)).is_err());
        }
    }

    #[test]
    fn a_record_without_a_checksum_is_refused() {
        let text = paragraph("aa", "1").replace("SHA256", "MD5sum");
        let error = parse_records(&text).unwrap_err().to_string();
        assert!(error.contains("package aa has no usable SHA256"), "{error}");
    }
}
