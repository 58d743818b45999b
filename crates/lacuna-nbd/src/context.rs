//! Meta contexts: names, and what their words mean (C.6, A.4).
//!
//! | name | status of an extent |
//! |---|---|
//! | `base:allocation` | [`AllocationFlags`](crate::wire::AllocationFlags): hole and zero, independent |
//! | `qemu:allocation-depth` | the depth that supplies the bytes: 0 nowhere, 1 this image, ... |
//! | `qemu:dirty-bitmap:NAME` | bit 0: changed since the bitmap was started |
//! | `x-lacuna:layers`, `x-lacuna:layers:NAME` | [`LayersStatus`]: 64 bits, so only with extended headers |

use crate::ContextId;

/// Hole and zero.
pub const BASE_ALLOCATION: &str = "base:allocation";
/// Which image of the chain supplies the bytes.
pub const QEMU_ALLOCATION_DEPTH: &str = "qemu:allocation-depth";
/// What the contexts of dirty bitmaps begin with; alone it lists them all.
pub const QEMU_DIRTY_BITMAP: &str = "qemu:dirty-bitmap:";
/// Zero, dirty and allocated for each level of the chain, dirty in the bitmaps that the server
/// chose. Private to lacuna.
pub const LAYERS: &str = "x-lacuna:layers";
/// What [`LAYERS`] begins with where the client chooses the bitmap: its name follows. Alone it
/// lists them all.
pub const LAYERS_OF_BITMAP: &str = "x-lacuna:layers:";
/// Bit 0 of a dirty bitmap's status.
pub const DIRTY: u64 = 1;

/// What the name of a context stands for.
///
/// ```
/// use lacuna_nbd::context::{ContextKind, QEMU_DIRTY_BITMAP};
/// assert_eq!(ContextKind::of("base:allocation"), ContextKind::BaseAllocation);
/// assert_eq!(ContextKind::of("qemu:dirty-bitmap:b0"), ContextKind::DirtyBitmap("b0"));
/// assert_eq!(ContextKind::of("x-lacuna:layers:b0"), ContextKind::Layers(Some("b0")));
/// assert_eq!(ContextKind::of(QEMU_DIRTY_BITMAP), ContextKind::Other);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ContextKind<'a> {
    /// `qemu:allocation-depth`.
    AllocationDepth,
    /// `base:allocation`.
    BaseAllocation,
    /// `qemu:dirty-bitmap:NAME`.
    DirtyBitmap(&'a str),
    /// `x-lacuna:layers`, and the bitmap where it names one.
    Layers(Option<&'a str>),
    /// Anything else, names that only match others among it.
    Other,
}

impl<'a> ContextKind<'a> {
    /// Returns what `name` stands for.
    #[must_use]
    pub fn of(name: &'a str) -> Self {
        match name {
            BASE_ALLOCATION => Self::BaseAllocation,
            QEMU_ALLOCATION_DEPTH => Self::AllocationDepth,
            LAYERS => Self::Layers(None),
            _ => Self::of_bitmap(name).unwrap_or(Self::Other),
        }
    }

    fn of_bitmap(name: &'a str) -> Option<Self> {
        let behind = |front| name.strip_prefix(front).filter(|bitmap| !bitmap.is_empty());
        behind(QEMU_DIRTY_BITMAP)
            .map(Self::DirtyBitmap)
            .or_else(|| behind(LAYERS_OF_BITMAP).map(|bitmap| Self::Layers(Some(bitmap))))
    }
}

/// How many bits a context's status needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StatusWidth {
    /// Fits both forms of a block status.
    Bits32,
    /// Only with extended headers.
    Bits64,
}

/// A context that an export has.
///
/// ```
/// use lacuna_nbd::ContextId;
/// use lacuna_nbd::context::{BASE_ALLOCATION, Context, StatusWidth};
/// let context = Context::new(BASE_ALLOCATION, ContextId(0));
/// assert_eq!(context.width, StatusWidth::Bits32);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Context {
    /// At most 4096 bytes: a namespace, a colon, and more.
    pub name: String,
    /// Unique on the export; the server's choice.
    pub id: ContextId,
    /// How wide its status is.
    pub width: StatusWidth,
}

impl Context {
    /// Makes a context; of those known here, only [`LAYERS`] and those that begin so are 64 bits
    /// wide.
    #[must_use]
    pub fn new(name: impl Into<String>, id: ContextId) -> Self {
        let name = name.into();
        let width = match ContextKind::of(&name) {
            ContextKind::Layers(_) => StatusWidth::Bits64,
            _ => StatusWidth::Bits32,
        };
        Self { name, id, width }
    }
}

/// The status word of [`LAYERS`].
///
/// | bit | meaning |
/// |---|---|
/// | 0 | the range reads as zeros |
/// | 1 + 2n | dirty at level n in the bitmap chosen there; n is 0 for the active image |
/// | 2 + 2n | allocated at level n |
/// | 63 | allocated or dirty somewhere deeper than level 30 |
///
/// The bits are independent. A private context of lacuna: thread 003 has the idea (rows 2, 3, 10),
/// no other server has it.
///
/// ```
/// use lacuna_nbd::context::LayersStatus;
/// // Changed since the last backup, and written here: worth copying.
/// let status = LayersStatus::default().with_dirty(0).with_allocated(0);
/// assert_eq!(status.0, 0b110);
/// assert!(status.is_dirty(0) && !status.is_dirty(1) && !status.reads_zero());
/// assert_eq!(LayersStatus::default().with_allocated(31).0, 1 << 63);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LayersStatus(pub u64);

impl LayersStatus {
    /// Levels that have bits of their own, from 0 on.
    pub const LEVELS: u32 = 31;
    const ZERO: u64 = 1;
    const DEEPER: u64 = 1 << 63;

    /// Adds that the range reads as zeros.
    #[must_use]
    pub const fn with_zero(self) -> Self {
        Self(self.0 | Self::ZERO)
    }

    /// Adds that the range is dirty at `level`.
    #[must_use]
    pub fn with_dirty(self, level: u32) -> Self {
        Self(self.0 | Self::bit(level, 1))
    }

    /// Adds that the range is allocated at `level`.
    #[must_use]
    pub fn with_allocated(self, level: u32) -> Self {
        Self(self.0 | Self::bit(level, 2))
    }

    /// Says whether the range reads as zeros.
    #[must_use]
    pub const fn reads_zero(self) -> bool {
        self.0 & Self::ZERO != 0
    }

    /// Says whether the range is dirty at `level`; past level 30, whether there is anything deeper.
    #[must_use]
    pub fn is_dirty(self, level: u32) -> bool {
        self.0 & Self::bit(level, 1) != 0
    }

    /// Says whether the range is allocated at `level`; past level 30, whether there is anything
    /// deeper.
    #[must_use]
    pub fn is_allocated(self, level: u32) -> bool {
        self.0 & Self::bit(level, 2) != 0
    }

    fn bit(level: u32, first: u32) -> u64 {
        let shift = level.saturating_mul(2).saturating_add(first);
        if level < Self::LEVELS { 1_u64.checked_shl(shift).unwrap_or(0) } else { Self::DEEPER }
    }
}
