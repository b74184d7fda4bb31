//! A bundle: a disk as parts in a bucket, and the manifest that names them.
//!
//! ```text
//!   PREFIX.part.0 … PREFIX.part.7     together a stream of one disk (archive.rs)
//!   PREFIX.manifest.xml               the disk's size; of each part its name, its size and its SHA-256
//! ```
//! The manifest is like EC2's in its form, and hutch's own: EC2's bundles are encrypted with keys of AWS.

use std::fmt::Write as _;
use std::io::{self, Read, Write};

use hutch_blockdev::SECTOR;
use roxmltree::{Document, Node};
use sha2::{Digest, Sha256};

use crate::archive;
use crate::objects::{ObjectError, ObjectReader, Objects, check_key};

/// What a manifest's name ends with.
pub const MANIFEST: &str = ".manifest.xml";
/// The most bytes of a manifest.
pub const MANIFEST_MOST: u64 = 4 << 20;
/// The bytes of a part.
const PART: usize = 64 << 20;
/// The most parts: a disk with 1 TiB of data.
const PARTS: usize = 16 << 10;
/// So many parts are told at once before they are written, and removed at once.
pub const BATCH: usize = 64;
/// The version of what is written here.
const VERSION: &str = "hutch-1";

/// What a manifest says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// The task that wrote it.
    pub task: Option<String>,
    /// The disk's size in bytes.
    pub size: u64,
    /// The kernel that it boots.
    pub kernel: Option<String>,
    /// The RAM disk that it boots.
    pub ramdisk: Option<String>,
    /// The parts, in order.
    pub parts: Vec<Part>,
}

/// A part of a bundle.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// The object's name.
    pub key: String,
    /// Its bytes.
    pub size: u64,
    /// SHA-256 of it, in hexadecimal.
    pub digest: String,
}

fn part_key(prefix: &str, index: usize) -> String {
    format!("{prefix}.part.{index}")
}

impl Manifest {
    /// As XML; the bundle is called so.
    pub fn text(&self, prefix: &str) -> String {
        let bytes: u64 = self.parts.iter().map(|part| part.size).sum();
        let mut text = format!("<?xml version=\"1.0\"?>\n<manifest>\n<version>{VERSION}</version>\n");
        // Ids are letters, digits and dashes; prefixes and digests need no escapes either.
        let _ = self.task.as_ref().map(|id| writeln!(text, "<bundle_id>{id}</bundle_id>"));
        let _ = write!(text, "<machine_configuration><architecture>x86_64</architecture>");
        for (name, id) in [("kernel_id", &self.kernel), ("ramdisk_id", &self.ramdisk)] {
            let _ = id.as_ref().map(|id| write!(text, "<{name}>{id}</{name}>"));
        }
        let _ = write!(
            text,
            "</machine_configuration>\n<image><name>{prefix}</name><type>machine</type><size>{}</size>\
             <bundled_size>{bytes}</bundled_size>\n<parts count=\"{}\">\n",
            self.size,
            self.parts.len()
        );
        for (index, Part { key, size, digest }) in self.parts.iter().enumerate() {
            let _ = writeln!(
                text,
                "<part index=\"{index}\"><filename>{key}</filename><size>{size}</size>\
                 <digest algorithm=\"SHA256\">{digest}</digest></part>"
            );
        }
        text.push_str("</parts></image>\n</manifest>\n");
        text
    }

    /// What the manifest of this name says, whoever wrote it. Its parts are beside it.
    ///
    /// # Errors
    /// It is no manifest, in words for whom it belongs to.
    pub fn read(key: &str, text: &[u8]) -> Result<Manifest, String> {
        let prefix =
            key.strip_suffix(MANIFEST).ok_or_else(|| format!("its name does not end in {MANIFEST}"))?;
        let text = std::str::from_utf8(text).map_err(|e| e.to_string())?;
        let document = Document::parse(text).map_err(|e| e.to_string())?;
        let root = document.root_element();
        let child = |of: Node<'_, '_>, name: &str| {
            let found = of.children().find(|node| node.has_tag_name(name));
            let text = found.and_then(|node| node.text()).map(str::trim).filter(|text| !text.is_empty());
            text.map(str::to_owned)
        };
        let below = |of: Node<'_, '_>, name: &str| {
            of.children().find(|node| node.has_tag_name(name)).map(|node| node.id())
        };
        let at = |id| document.get_node(id);
        let need = |what: &str| format!("it has no {what}");
        if child(root, "version").as_deref() != Some(VERSION) {
            return Err(format!("it is not of the version {VERSION}, which hutch bundles are"));
        }
        let machine =
            below(root, "machine_configuration").and_then(at).ok_or_else(|| need("machine_configuration"))?;
        if child(machine, "architecture").as_deref() != Some("x86_64") {
            return Err("it is not of x86_64".into());
        }
        let image = below(root, "image").and_then(at).ok_or_else(|| need("image"))?;
        let number = |of: Node<'_, '_>, name: &str| child(of, name).and_then(|text| text.parse::<u64>().ok());
        let size = number(image, "size")
            .filter(|size| (1..=archive::DISK).contains(size) && size.is_multiple_of(SECTOR));
        let size = size.ok_or("its size is none of a disk")?;
        let list = below(image, "parts").and_then(at).ok_or_else(|| need("parts"))?;
        let mut parts = Vec::new();
        for part in list.children().filter(|node| node.has_tag_name("part")) {
            let index = parts.len();
            let key = child(part, "filename").filter(|name| *name == part_key(prefix, index));
            let size = number(part, "size").filter(|size| (1..=PART as u64).contains(size));
            let hex = |digest: &String| digest.len() == 64 && digest.bytes().all(|b| b.is_ascii_hexdigit());
            let digest = child(part, "digest").filter(hex);
            let (Some(key), Some(size), Some(digest)) = (key, size, digest) else {
                return Err(format!(
                    "its part {index} is not {}, with size and digest",
                    part_key(prefix, index)
                ));
            };
            parts.push(Part { key, size, digest: digest.to_ascii_lowercase() });
        }
        if parts.is_empty() || parts.len() > PARTS {
            return Err("it has no parts, or too many".into());
        }
        let id = |name: &str, kind: &str| match child(machine, name) {
            Some(id) if crate::id::check(&id, kind, "InvalidAMIID").is_err() => {
                Err(format!("its {name} is no id"))
            }
            id => Ok(id),
        };
        let (kernel, ramdisk) = (id("kernel_id", "aki")?, id("ramdisk_id", "ari")?);
        Ok(Manifest { task: child(root, "bundle_id"), size, kernel, ramdisk, parts })
    }
}

/// Whether a bundle may be called so.
///
/// # Errors
/// `InvalidParameterValue`.
pub fn check_prefix(prefix: &str) -> crate::fault::Result<()> {
    check_key("Prefix", prefix)?;
    check_key("Prefix", &format!("{prefix}{MANIFEST}"))
}

/// Removes those parts of a bundle that is not to be, the last one first, so that whoever counts what is left may carry on.
///
/// # Errors
/// One cannot be removed.
pub fn remove(
    objects: &Objects,
    bucket: &str,
    prefix: &str,
    parts: std::ops::Range<usize>,
) -> Result<(), ObjectError> {
    parts.rev().try_for_each(|index| objects.delete(bucket, &part_key(prefix, index)))
}

/// What is told how many parts there will be at most, before they are written.
pub type Ahead<'a> = dyn FnMut(usize) -> Result<(), ObjectError> + 'a;

/// Cuts a stream into parts, and writes each where it belongs.
pub struct Writer<'a> {
    objects: &'a Objects,
    bucket: &'a str,
    prefix: &'a str,
    ahead: &'a mut Ahead<'a>,
    part: Vec<u8>,
    parts: Vec<Part>,
}

impl<'a> Writer<'a> {
    /// Begins the parts of a bundle.
    pub fn new(
        objects: &'a Objects,
        bucket: &'a str,
        prefix: &'a str,
        ahead: &'a mut Ahead<'a>,
    ) -> Writer<'a> {
        Writer { objects, bucket, prefix, ahead, part: Vec::new(), parts: Vec::new() }
    }

    fn send(&mut self) -> Result<(), ObjectError> {
        if self.parts.len() == PARTS {
            return Err(ObjectError::Failed(format!("a bundle has {PARTS} parts at most, of 64 MiB each")));
        }
        if self.parts.len().is_multiple_of(BATCH) {
            (self.ahead)(self.parts.len() + BATCH)?;
        }
        let part = std::mem::take(&mut self.part);
        let digest = format!("{:x}", Sha256::digest(&part));
        let (key, size) = (part_key(self.prefix, self.parts.len()), part.len() as u64);
        self.parts.push(Part { key: key.clone(), size, digest });
        self.objects.put(self.bucket, &key, part)
    }

    /// Writes the last part; tells all of them.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn finish(mut self) -> Result<Vec<Part>, ObjectError> {
        if !self.part.is_empty() {
            self.send()?;
        }
        Ok(self.parts)
    }
}

impl Write for Writer<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let take = bytes.len().min(PART - self.part.len());
        self.part.extend_from_slice(bytes.get(..take).unwrap_or_default());
        if self.part.len() == PART {
            self.send().map_err(io::Error::other)?;
        }
        Ok(take)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The stream that a bundle's parts are; each is what the manifest says, or reading fails.
pub struct Reader<'a> {
    objects: &'a Objects,
    bucket: &'a str,
    parts: std::slice::Iter<'a, Part>,
    now: Option<(ObjectReader<'a>, &'a Part, Sha256)>,
}

impl<'a> Reader<'a> {
    /// Begins to read a bundle.
    pub fn new(objects: &'a Objects, bucket: &'a str, manifest: &'a Manifest) -> Reader<'a> {
        Reader { objects, bucket, parts: manifest.parts.iter(), now: None }
    }
}

impl Read for Reader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let changed = |part: &Part| {
            let why = format!(
                "{} is not the part that its manifest names: it is damaged, or was changed",
                part.key
            );
            io::Error::new(io::ErrorKind::InvalidData, why)
        };
        loop {
            let Some((reader, part, sum)) = &mut self.now else {
                let Some(part) = self.parts.next() else { return Ok(0) };
                let reader = self.objects.read(self.bucket, &part.key).map_err(io::Error::other)?;
                if reader.size != part.size {
                    return Err(changed(part));
                }
                self.now = Some((reader, part, Sha256::new()));
                continue;
            };
            let count = reader.read(buffer)?;
            if count > 0 {
                sum.update(buffer.get(..count).unwrap_or_default());
                return Ok(count);
            }
            if format!("{:x}", sum.clone().finalize()) != part.digest {
                return Err(changed(part));
            }
            self.now = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest() -> Manifest {
        let part = |index| Part { key: part_key("a/web", index), size: 64 << 20, digest: "0f".repeat(32) };
        Manifest {
            task: Some("bun-1".into()),
            size: 2 << 30,
            kernel: Some("aki-12345678".into()),
            ramdisk: None,
            parts: vec![part(0), part(1)],
        }
    }

    #[test]
    fn a_manifest_says_what_it_was_told() {
        let text = manifest().text("a/web");
        assert_eq!(Manifest::read("a/web.manifest.xml", text.as_bytes()).unwrap(), manifest());
        for (from, to) in [
            ("hutch-1", "2007-10-10"),
            ("a/web.part.1", "../other.part.1"),
            ("a/web.part.1", "a/web.part.0"),
            ("x86_64", "arm64"),
            ("<size>2147483648</size>", "<size>2147483649</size>"),
            ("<size>2147483648</size>", "<size>18446744073709551104</size>"),
            ("<size>67108864</size>", "<size>0</size>"),
            ("aki-12345678", "ari-12345678"),
            (&*"0f".repeat(32), "0f"),
            ("</manifest>", ""),
            ("<manifest>", "<!DOCTYPE a [<!ENTITY b \"b\">]><manifest>"),
        ] {
            let changed = text.replacen(from, to, 1);
            assert_ne!(changed, text);
            assert!(Manifest::read("a/web.manifest.xml", changed.as_bytes()).is_err(), "{from} {to}");
        }
        assert!(Manifest::read("a/other.manifest.xml", text.as_bytes()).is_err(), "its parts lie elsewhere");
        assert!(Manifest::read("a/web.xml", text.as_bytes()).is_err());
        assert!(Manifest::read("a/web.manifest.xml", b"\xff").is_err());
    }

    #[test]
    fn parts_are_those_of_the_manifest() {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let objects = Objects::memory(runtime.handle().clone());
        let bytes: Vec<u8> = (0..PART + 1000).map(|n| (n % 253) as u8).collect();
        let (mut told, bucket) = (0, "bucket");
        let mut ahead = |parts| {
            // Who is killed between knows of what may be there.
            assert!(matches!(objects.read(bucket, "web.part.0"), Err(ObjectError::Missing(_))));
            told = parts;
            Ok(())
        };
        let mut writer = Writer::new(&objects, bucket, "web", &mut ahead);
        writer.write_all(&bytes).unwrap();
        let parts = writer.finish().unwrap();
        assert_eq!(told, BATCH);
        assert_eq!(parts.iter().map(|part| part.size).collect::<Vec<_>>(), [PART as u64, 1000]);
        let manifest = Manifest { task: None, size: 512, kernel: None, ramdisk: None, parts };
        let read = || {
            let mut all = Vec::new();
            Reader::new(&objects, "bucket", &manifest).read_to_end(&mut all).map(|_| all)
        };
        assert!(read().unwrap() == bytes);
        for other in [vec![7; 1000], vec![7; 999]] {
            objects.put("bucket", "web.part.1", other).unwrap();
            assert_eq!(read().unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
        objects.delete("bucket", "web.part.1").unwrap();
        assert!(read().is_err());
        // One that was killed in the middle left a gap.
        objects.put("bucket", "web.part.3", vec![1]).unwrap();
        remove(&objects, "bucket", "web", 0..told).unwrap();
        for index in [0, 1, 3] {
            assert!(matches!(objects.read("bucket", &part_key("web", index)), Err(ObjectError::Missing(_))));
        }
    }
}
