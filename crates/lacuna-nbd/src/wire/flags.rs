//! Flag words (C.2, C.3, C.4, C.5, C.6). Unknown bits are kept.

use bitflags::bitflags;

bitflags! {
    /// What a server says of itself in its greeting.
    ///
    /// ```
    /// use lacuna_nbd::wire::HandshakeFlags;
    /// assert_eq!(HandshakeFlags::all().bits(), 3);
    /// ```
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct HandshakeFlags: u16 {
        /// Options are answered, and unknown ones survived.
        const FIXED_NEWSTYLE = 1 << 0;
        /// The 124 zero bytes may be left out.
        const NO_ZEROES = 1 << 1;
    }
}

bitflags! {
    /// What a client answers to the greeting.
    ///
    /// ```
    /// use lacuna_nbd::wire::ClientFlags;
    /// assert_eq!(ClientFlags::NO_ZEROES.bits(), 2);
    /// ```
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct ClientFlags: u32 {
        /// Knows that options are answered.
        const FIXED_NEWSTYLE = 1 << 0;
        /// Does not want the 124 zero bytes.
        const NO_ZEROES = 1 << 1;
    }
}

bitflags! {
    /// What may be asked of an export (C.3).
    ///
    /// ```
    /// use lacuna_nbd::wire::TransmissionFlags;
    /// let flags = TransmissionFlags::HAS_FLAGS | TransmissionFlags::SEND_FLUSH;
    /// assert_eq!(flags.bits(), 5);
    /// ```
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct TransmissionFlags: u16 {
        /// Always set.
        const HAS_FLAGS = 1 << 0;
        /// Changes fail.
        const READ_ONLY = 1 << 1;
        /// `FLUSH` is supported.
        const SEND_FLUSH = 1 << 2;
        /// FUA is accepted on all commands.
        const SEND_FUA = 1 << 3;
        /// Seeks are slow.
        const ROTATIONAL = 1 << 4;
        /// `TRIM` is supported.
        const SEND_TRIM = 1 << 5;
        /// `WRITE_ZEROES` and `NO_HOLE` are supported.
        const SEND_WRITE_ZEROES = 1 << 6;
        /// Reads can be asked for in one piece; only where replies have chunks.
        const SEND_DF = 1 << 7;
        /// Connections see each other's writes, and a flush on one covers all.
        const CAN_MULTI_CONN = 1 << 8;
        /// `RESIZE` is supported (branch `extension-resize`).
        const SEND_RESIZE = 1 << 9;
        /// `CACHE` is supported.
        const SEND_CACHE = 1 << 10;
        /// `FAST_ZERO` is supported; only with `SEND_WRITE_ZEROES`.
        const SEND_FAST_ZERO = 1 << 11;
        /// `BLOCK_STATUS` may name contexts; only with extended headers.
        const BLOCK_STATUS_PAYLOAD = 1 << 12;
    }
}

bitflags! {
    /// Flags of a request (C.4).
    ///
    /// ```
    /// use lacuna_nbd::wire::CommandFlags;
    /// assert_eq!(CommandFlags::PAYLOAD_LEN.bits(), 32);
    /// ```
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct CommandFlags: u16 {
        /// Replied to when durable.
        const FUA = 1 << 0;
        /// `WRITE_ZEROES`: the range ends fully provisioned.
        const NO_HOLE = 1 << 1;
        /// `READ`: at most one chunk of content.
        const DF = 1 << 2;
        /// `BLOCK_STATUS`: one extent, no longer than the request.
        const REQ_ONE = 1 << 3;
        /// `WRITE_ZEROES`: fail at once rather than be as slow as a write.
        const FAST_ZERO = 1 << 4;
        /// The length is that of a payload that follows; only with extended headers.
        const PAYLOAD_LEN = 1 << 5;
    }
}

bitflags! {
    /// Flags of a chunk (C.5).
    ///
    /// ```
    /// use lacuna_nbd::wire::ChunkFlags;
    /// assert_eq!(ChunkFlags::DONE.bits(), 1);
    /// ```
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct ChunkFlags: u16 {
        /// The last chunk of a reply.
        const DONE = 1 << 0;
    }
}

bitflags! {
    /// What was true of the export when the connection was made (A.1.5). Says nothing after any
    /// write by anybody; a clear bit says nothing either.
    ///
    /// ```
    /// use lacuna_nbd::wire::InitState;
    /// assert_eq!((InitState::SPARSE | InitState::ZERO).bits(), 3);
    /// ```
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct InitState: u16 {
        /// At least one region is not allocated.
        const SPARSE = 1 << 0;
        /// Every byte reads as zero.
        const ZERO = 1 << 1;
    }
}

bitflags! {
    /// What `base:allocation` says of an extent. The bits are independent; a clear bit says nothing.
    ///
    /// ```
    /// use lacuna_nbd::wire::AllocationFlags;
    /// // Contents that are undefined: legal, and no promise of zeros.
    /// assert!(!AllocationFlags::HOLE.contains(AllocationFlags::ZERO));
    /// ```
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct AllocationFlags: u32 {
        /// No space is reserved: a write may fragment the file or fail for lack of space.
        const HOLE = 1 << 0;
        /// Reads as zeros.
        const ZERO = 1 << 1;
    }
}
