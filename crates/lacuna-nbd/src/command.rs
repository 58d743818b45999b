//! Commands that are answered.

use crate::wire::CommandCode;

/// What a request asks for.
///
/// ```
/// use lacuna_nbd::Command;
/// use lacuna_nbd::wire::CommandCode;
/// assert_eq!(Command::of(CommandCode::TRIM), Some(Command::Trim));
/// assert_eq!(Command::of(CommandCode::DISC), None); // not a request: nobody answers
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// What is known of the range, in the wanted contexts. `REQ_ONE` wants one extent of each.
    BlockStatus,
    /// The range will be read.
    Cache,
    /// Make durable all that was replied to before, on every connection.
    Flush,
    /// The bytes of the range. `DF` wants them in one piece.
    Read,
    /// Change the size of the export to `range.start`; `range.len` is 0.
    Resize,
    /// The range is not needed. `FUA` wants it durable.
    Trim,
    /// The payload into the range. `FUA` wants it durable.
    Write,
    /// Zeros into the range. `FUA`, `NO_HOLE`, `FAST_ZERO`.
    WriteZeroes,
}

impl Command {
    /// Returns the command of a number, unless it is unknown or has no answer.
    #[must_use]
    pub const fn of(code: CommandCode) -> Option<Self> {
        Some(match code {
            CommandCode::READ => Self::Read,
            CommandCode::WRITE => Self::Write,
            CommandCode::FLUSH => Self::Flush,
            CommandCode::TRIM => Self::Trim,
            CommandCode::CACHE => Self::Cache,
            CommandCode::WRITE_ZEROES => Self::WriteZeroes,
            CommandCode::BLOCK_STATUS => Self::BlockStatus,
            CommandCode::RESIZE => Self::Resize,
            _ => return None,
        })
    }

    /// Returns the number of the command.
    #[must_use]
    pub const fn code(self) -> CommandCode {
        match self {
            Self::Read => CommandCode::READ,
            Self::Write => CommandCode::WRITE,
            Self::Flush => CommandCode::FLUSH,
            Self::Trim => CommandCode::TRIM,
            Self::Cache => CommandCode::CACHE,
            Self::WriteZeroes => CommandCode::WRITE_ZEROES,
            Self::BlockStatus => CommandCode::BLOCK_STATUS,
            Self::Resize => CommandCode::RESIZE,
        }
    }
}
