//! Numbers of options, replies, commands, chunks and errors (C.2, C.4, C.5, C.7).
//!
//! All of them are open: a number that nobody knows is kept, and shown as a number.

use std::fmt;

/// Declares an open set of numbers with names for those that are known.
macro_rules! codes {
    ($(#[$doc:meta])* $name:ident($number:ty) {
        $($(#[$what:meta])* $constant:ident = $value:expr, $text:literal;)*
    }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub $number);

        impl $name {
            $($(#[$what])* pub const $constant: Self = Self($value);)*

            /// Returns the name in the specification, if the number has one.
            #[must_use]
            pub const fn name(self) -> Option<&'static str> {
                match self {
                    $(Self::$constant => Some($text),)*
                    _ => None,
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self.name() {
                    Some(name) => f.write_str(name),
                    None => write!(f, "{}", self.0),
                }
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({self})", stringify!($name))
            }
        }
    };
}

codes! {
    /// What a client asks for while options are haggled over (proto.md, "Option types").
    ///
    /// ```
    /// use lacuna_nbd::wire::OptionCode;
    /// assert_eq!(OptionCode::GO.0, 7);
    /// assert_eq!(OptionCode(99).to_string(), "99");
    /// ```
    OptionCode(u32) {
        /// Chooses an export without a way to learn of an error.
        EXPORT_NAME = 1, "NBD_OPT_EXPORT_NAME";
        /// Ends the session.
        ABORT = 2, "NBD_OPT_ABORT";
        /// Lists the exports.
        LIST = 3, "NBD_OPT_LIST";
        /// Withdrawn.
        PEEK_EXPORT = 4, "NBD_OPT_PEEK_EXPORT";
        /// Turns to TLS; all that was negotiated is forgotten.
        STARTTLS = 5, "NBD_OPT_STARTTLS";
        /// Describes an export.
        INFO = 6, "NBD_OPT_INFO";
        /// Describes an export and begins to use it.
        GO = 7, "NBD_OPT_GO";
        /// Asks for structured replies.
        STRUCTURED_REPLY = 8, "NBD_OPT_STRUCTURED_REPLY";
        /// Lists the meta contexts of an export.
        LIST_META_CONTEXT = 9, "NBD_OPT_LIST_META_CONTEXT";
        /// Chooses meta contexts of an export.
        SET_META_CONTEXT = 10, "NBD_OPT_SET_META_CONTEXT";
        /// Asks for 64-bit headers in both directions.
        EXTENDED_HEADERS = 11, "NBD_OPT_EXTENDED_HEADERS";
    }
}

codes! {
    /// What a server answers to an option (proto.md, "Option reply types").
    ///
    /// ```
    /// use lacuna_nbd::wire::ReplyCode;
    /// assert!(ReplyCode::ERR_UNSUP.is_error() && !ReplyCode::ACK.is_error());
    /// ```
    ReplyCode(u32) {
        /// Done.
        ACK = 1, "NBD_REP_ACK";
        /// One export of a list.
        SERVER = 2, "NBD_REP_SERVER";
        /// One fact about an export.
        INFO = 3, "NBD_REP_INFO";
        /// One meta context.
        META_CONTEXT = 4, "NBD_REP_META_CONTEXT";
        /// The option is not known.
        ERR_UNSUP = ERROR | 1, "NBD_REP_ERR_UNSUP";
        /// The server may not.
        ERR_POLICY = ERROR | 2, "NBD_REP_ERR_POLICY";
        /// The option makes no sense as it was sent.
        ERR_INVALID = ERROR | 3, "NBD_REP_ERR_INVALID";
        /// The machine or the build cannot.
        ERR_PLATFORM = ERROR | 4, "NBD_REP_ERR_PLATFORM";
        /// Not without TLS.
        ERR_TLS_REQD = ERROR | 5, "NBD_REP_ERR_TLS_REQD";
        /// There is no such export.
        ERR_UNKNOWN = ERROR | 6, "NBD_REP_ERR_UNKNOWN";
        /// The server is about to end.
        ERR_SHUTDOWN = ERROR | 7, "NBD_REP_ERR_SHUTDOWN";
        /// Not without asking for the block sizes.
        ERR_BLOCK_SIZE_REQD = ERROR | 8, "NBD_REP_ERR_BLOCK_SIZE_REQD";
        /// Too much was asked at once.
        ERR_TOO_BIG = ERROR | 9, "NBD_REP_ERR_TOO_BIG";
        /// Not without extended headers.
        ERR_EXT_HEADER_REQD = ERROR | 10, "NBD_REP_ERR_EXT_HEADER_REQD";
    }
}

/// Marks the answers that are errors.
const ERROR: u32 = 1 << 31;

impl ReplyCode {
    /// Says whether the answer is an error.
    #[must_use]
    pub const fn is_error(self) -> bool {
        self.0 & ERROR != 0
    }
}

codes! {
    /// A fact about an export (proto.md, `NBD_REP_INFO`).
    ///
    /// ```
    /// use lacuna_nbd::wire::InfoType;
    /// assert_eq!(InfoType::BLOCK_SIZE.0, 3);
    /// ```
    InfoType(u16) {
        /// Size and transmission flags.
        EXPORT = 0, "NBD_INFO_EXPORT";
        /// The canonical name.
        NAME = 1, "NBD_INFO_NAME";
        /// A text for people.
        DESCRIPTION = 2, "NBD_INFO_DESCRIPTION";
        /// Minimum, preferred and largest sizes.
        BLOCK_SIZE = 3, "NBD_INFO_BLOCK_SIZE";
        /// Whether it is sparse and whether it reads as zeros (A.1.5). A private number: proposed
        /// in 2020, never assigned. Sent only to those who ask.
        INIT_STATE = 4, "NBD_INFO_INIT_STATE";
    }
}

codes! {
    /// The number of a command (proto.md, "Request types").
    ///
    /// ```
    /// use lacuna_nbd::wire::CommandCode;
    /// assert_eq!(CommandCode::BLOCK_STATUS.0, 7);
    /// ```
    CommandCode(u16) {
        /// Reads.
        READ = 0, "NBD_CMD_READ";
        /// Writes; the only command that always has a payload.
        WRITE = 1, "NBD_CMD_WRITE";
        /// Ends the session; has no reply.
        DISC = 2, "NBD_CMD_DISC";
        /// Makes durable what was replied to.
        FLUSH = 3, "NBD_CMD_FLUSH";
        /// Says that a range is not needed.
        TRIM = 4, "NBD_CMD_TRIM";
        /// Says that a range will be read.
        CACHE = 5, "NBD_CMD_CACHE";
        /// Makes a range read as zeros.
        WRITE_ZEROES = 6, "NBD_CMD_WRITE_ZEROES";
        /// Asks what is known of a range.
        BLOCK_STATUS = 7, "NBD_CMD_BLOCK_STATUS";
        /// Changes the size of the export: the offset is the new size (branch `extension-resize`).
        RESIZE = 8, "NBD_CMD_RESIZE";
    }
}

codes! {
    /// What a chunk of a structured or extended reply is (C.5).
    ///
    /// ```
    /// use lacuna_nbd::wire::ChunkType;
    /// assert!(ChunkType::ERROR_OFFSET.is_error());
    /// ```
    ChunkType(u16) {
        /// Nothing but the end.
        NONE = 0, "NBD_REPLY_TYPE_NONE";
        /// Bytes that were read.
        OFFSET_DATA = 1, "NBD_REPLY_TYPE_OFFSET_DATA";
        /// A range that reads as zeros.
        OFFSET_HOLE = 2, "NBD_REPLY_TYPE_OFFSET_HOLE";
        /// Extents of one meta context, 32 bits wide.
        BLOCK_STATUS = 5, "NBD_REPLY_TYPE_BLOCK_STATUS";
        /// Extents of one meta context, 64 bits wide.
        BLOCK_STATUS_EXT = 6, "NBD_REPLY_TYPE_BLOCK_STATUS_EXT";
        /// An error.
        ERROR = 1 << 15 | 1, "NBD_REPLY_TYPE_ERROR";
        /// An error at an offset.
        ERROR_OFFSET = 1 << 15 | 2, "NBD_REPLY_TYPE_ERROR_OFFSET";
    }
}

impl ChunkType {
    /// Says whether the chunk reports an error, known or not.
    #[must_use]
    pub const fn is_error(self) -> bool {
        self.0 & (1 << 15) != 0
    }
}

codes! {
    /// An error on the wire (C.7): Linux numbers, whatever the host is.
    ///
    /// ```
    /// use lacuna_nbd::wire::ErrorCode;
    /// assert_eq!(ErrorCode::from_errno(30), ErrorCode::EPERM); // EROFS
    /// assert_eq!(ErrorCode::from_errno(122), ErrorCode::ENOSPC); // EDQUOT
    /// assert_eq!(ErrorCode::from_errno(9), ErrorCode::EIO); // not the client's business
    /// ```
    ErrorCode(u32) {
        /// Not permitted, most of all a change of something read-only.
        EPERM = 1, "EPERM";
        /// The host failed.
        EIO = 5, "EIO";
        /// No memory; better not said.
        ENOMEM = 12, "ENOMEM";
        /// The request makes no sense.
        EINVAL = 22, "EINVAL";
        /// No space, or a write past the end.
        ENOSPC = 28, "ENOSPC";
        /// Too much at once.
        EOVERFLOW = 75, "EOVERFLOW";
        /// Cannot be done fast: for fast zeroes only.
        ENOTSUP = 95, "ENOTSUP";
        /// The server is about to end.
        ESHUTDOWN = 108, "ESHUTDOWN";
    }
}

impl ErrorCode {
    /// Turns a Linux error number into one that the protocol has; all others become `EIO`.
    ///
    /// `ENOTSUP` and `EOVERFLOW` become `EINVAL`: where they may be sent, the server means them and
    /// names the constants.
    #[must_use]
    pub const fn from_errno(number: i32) -> Self {
        const EROFS: i32 = 30;
        const EFBIG: i32 = 27;
        const EDQUOT: i32 = 122;
        match number {
            1 | EROFS => Self::EPERM,
            12 => Self::ENOMEM,
            22 | 75 | 95 => Self::EINVAL,
            28 | EFBIG | EDQUOT => Self::ENOSPC,
            108 => Self::ESHUTDOWN,
            _ => Self::EIO,
        }
    }

    /// Returns the error that a client should act on: unknown numbers count as `EINVAL`.
    #[must_use]
    pub const fn known(self) -> Self {
        if self.name().is_some() { self } else { Self::EINVAL }
    }
}
