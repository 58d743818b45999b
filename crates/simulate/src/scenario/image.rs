//! The images of a run: what they are like, and what they stand on.

use lacuna::chain::Format;
use lacuna::qcow2::format::{CompressionType, EntryWidth, Version};
use lacuna::qcow2::{BackingName, CreateOptions, DataFileName};
use testkit::Random;

use crate::files::{DATA, NAMES};

/// The image at the start.
#[derive(Clone, Debug)]
pub(crate) struct ImageSpec {
    pub(crate) version: Version,
    pub(crate) cluster_bits: u32,
    pub(crate) is_extended: bool,
    pub(crate) refcount_bits: u32,
    pub(crate) is_zstd: bool,
    pub(crate) is_lazy: bool,
    pub(crate) has_zero_claims: bool,
    pub(crate) keeps_mapping: bool,
    pub(crate) size_bytes: u64,
    /// What it stands on, if there is anything.
    pub(crate) below: Option<BelowSpec>,
    /// Where its data goes, if not into itself.
    pub(crate) data: Option<DataSpec>,
    /// Seed of the ways in which it is opened.
    pub(crate) opening: u64,
}

/// An external data file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DataSpec {
    /// Guest data lies where there was room.
    Plain,
    /// The file is the disk, too.
    Raw,
}

/// A disk that an image stands on, and what that stands on, if there is anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BelowSpec {
    pub(crate) own: DiskSpec,
    pub(crate) base: Option<DiskSpec>,
}

/// A disk with content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DiskSpec {
    pub(crate) form: BelowForm,
    pub(crate) size_bytes: u64,
    /// Seed of its content.
    pub(crate) content: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BelowForm {
    Raw,
    Qcow2 { version: Version, cluster_bits: u32 },
}

impl ImageSpec {
    pub(super) fn new(random: &mut Random) -> Self {
        let cluster_bits = *random.pick(&[9, 9, 9, 10, 12, 12, 14, 14, 16]);
        let version = if random.one_in(4) { Version::V2 } else { Version::V3 };
        let is_3 = version == Version::V3;
        let clusters = match cluster_bits {
            9 | 10 => 20 + random.below(180),
            12 => 8 + random.below(40),
            14 => 4 + random.below(12),
            _ => 2 + random.below(4),
        };
        let size_bytes = (clusters << cluster_bits) + 512 * random.below(3);
        let below = random.one_in(2).then(|| {
            let below = BelowSpec::new(size_bytes, cluster_bits, random);
            below.on_a_base(size_bytes, cluster_bits)
        });
        let data = (is_3 && random.one_in(8)).then(|| match below {
            // A raw data file would lack what a backing file has.
            None if random.one_in(2) => DataSpec::Raw,
            _ => DataSpec::Plain,
        });
        Self {
            version,
            cluster_bits,
            is_extended: is_3 && cluster_bits >= 14 && random.one_in(2),
            refcount_bits: if is_3 { *random.pick(&[1, 2, 4, 8, 16, 16, 16, 32, 64]) } else { 16 },
            is_zstd: is_3 && random.one_in(4),
            is_lazy: is_3 && random.one_in(6),
            has_zero_claims: is_3 && random.one_in(3),
            keeps_mapping: is_3 && random.one_in(12),
            size_bytes,
            below,
            data,
            opening: random.next(),
        }
    }

    pub(crate) const fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Describes the image; what it stands on has that name.
    pub(crate) fn create_options(&self, below: &str) -> CreateOptions {
        CreateOptions {
            size_bytes: self.size_bytes,
            version: self.version,
            cluster_bytes: self.cluster_bytes(),
            entry_width: if self.is_extended { EntryWidth::Extended } else { EntryWidth::Standard },
            refcount_bits: self.refcount_bits,
            compression: match self.is_zstd {
                true => CompressionType::Zstd,
                false => CompressionType::Deflate,
            },
            lazy_refcounts: self.is_lazy,
            backing: self.below.map(|it| it.named(below)),
            data_file: self
                .data
                .map(|data| DataFileName { name: NAMES[DATA].into(), raw: data == DataSpec::Raw }),
            keep_mapping: self.keeps_mapping,
            zero_claims: self.has_zero_claims,
            ..CreateOptions::default()
        }
    }
}

impl BelowSpec {
    /// Makes one, on nothing, for a disk of that size.
    pub(super) fn new(size_bytes: u64, cluster_bits: u32, random: &mut Random) -> Self {
        Self { own: DiskSpec::new(size_bytes, cluster_bits, random), base: None }
    }

    /// Puts every other one that can stand on something onto a base. What else happens does not depend
    /// on that.
    fn on_a_base(self, size_bytes: u64, cluster_bits: u32) -> Self {
        let random = &mut Random::new(self.own.content ^ 0xba5e);
        let can_have = self.own.format() == Format::Qcow2 && random.one_in(2);
        Self { base: can_have.then(|| DiskSpec::new(size_bytes, cluster_bits, random)), ..self }
    }

    pub(crate) fn named(&self, name: &str) -> BackingName {
        self.own.named(name)
    }
}

impl DiskSpec {
    /// Makes one for a disk of that size: shorter, mostly; as long, or longer.
    fn new(size_bytes: u64, cluster_bits: u32, random: &mut Random) -> Self {
        let form = match random.below(3) {
            0 => BelowForm::Raw,
            _ => BelowForm::Qcow2 {
                version: if random.one_in(3) { Version::V2 } else { Version::V3 },
                // Small disks of large clusters tell little.
                cluster_bits: *random.pick(&[9, 9, 10, cluster_bits.min(12), cluster_bits]),
            },
        };
        let sectors = size_bytes.div_ceil(512);
        let sectors = match random.below(4) {
            0 => sectors,
            1 => 1 + random.below(sectors * 3 / 2),
            _ => 1 + random.below(sectors),
        };
        Self { form, size_bytes: 512 * sectors, content: random.next() }
    }

    pub(crate) const fn format(&self) -> Format {
        match self.form {
            BelowForm::Raw => Format::Raw,
            BelowForm::Qcow2 { .. } => Format::Qcow2,
        }
    }

    pub(crate) fn named(&self, name: &str) -> BackingName {
        BackingName { name: name.to_owned(), format: Some(self.format().to_string()) }
    }
}
