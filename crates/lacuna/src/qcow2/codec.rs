//! Compressing and decompressing one cluster (B.5).
//!
//! * Always: deflate is written with a window of 4 KiB, because strict readers take no more; it is
//!   read with any window up to 32 KiB.
//! * Always: bytes behind the end of a stream are ignored, since only whole sectors are recorded
//!   and a neighbour may follow.
//! * Never: sizes that a stream claims are believed; the output is exactly what was asked for.
//!
//! Contexts are kept per thread: setting one up costs more than a small cluster.

use std::cell::RefCell;

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};
use zstd::stream::raw::{Decoder, InBuffer, Operation, OutBuffer};

use super::format::CompressionType;
use crate::{Error, Result};

/// Binary logarithm of the window that deflate writes with: what QEMU uses.
const WRITTEN_WINDOW_BITS: u8 = 12;

thread_local! {
    static DEFLATE: RefCell<Compress> = RefCell::new(new_deflate());
    static INFLATE: RefCell<Decompress> = RefCell::new(Decompress::new(false));
    static ZSTD_WRITER: RefCell<Option<zstd::bulk::Compressor<'static>>> =
        const { RefCell::new(None) };
    static ZSTD_READER: RefCell<Option<Decoder<'static>>> = const { RefCell::new(None) };
}

/// Fills `output` from the compressed stream at the start of `input`.
///
/// # Errors
/// `Corrupt` where the stream is invalid or ends before the output is full.
pub(crate) fn decompress(kind: CompressionType, input: &[u8], output: &mut [u8]) -> Result<()> {
    let done = match kind {
        CompressionType::Deflate => inflate(input, output)?,
        CompressionType::Zstd => zstd_decompress(input, output)?,
    };
    if done == output.len() {
        return Ok(());
    }
    Err(Error::corrupt(format!(
        "Compressed stream ends after {done} bytes; {} would be right",
        output.len()
    )))
}

/// Compresses `input` into `output`; returns the length of the stream, or nothing where it would
/// not fit or not be shorter than the input. `output` holds unspecified bytes then.
///
/// # Errors
/// `Io` where no compression context can be made.
pub(crate) fn compress(
    kind: CompressionType,
    input: &[u8],
    output: &mut [u8],
) -> Result<Option<usize>> {
    let len = match kind {
        CompressionType::Deflate => deflate(input, output),
        CompressionType::Zstd => zstd_compress(input, output)?,
    };
    Ok(len.filter(|len| *len < input.len()))
}

fn invalid(error: impl std::fmt::Display) -> Error {
    Error::corrupt(format!("Compressed stream is invalid: {error}"))
}

fn inflate(input: &[u8], output: &mut [u8]) -> Result<usize> {
    INFLATE.with_borrow_mut(|context| {
        context.reset(false);
        // In one go: distances are resolved in the output, whatever window the writer had.
        context.decompress(input, output, FlushDecompress::Finish).map_err(invalid)?;
        Ok(usize::try_from(context.total_out()).unwrap_or(usize::MAX))
    })
}

fn new_deflate() -> Compress {
    Compress::new_with_window_bits(Compression::default(), false, WRITTEN_WINDOW_BITS)
}

fn deflate(input: &[u8], output: &mut [u8]) -> Option<usize> {
    DEFLATE.with_borrow_mut(|context| {
        context.reset();
        if let Ok(Status::StreamEnd) = context.compress(input, output, FlushCompress::Finish) {
            return usize::try_from(context.total_out()).ok();
        }
        // What found no room in the output goes on to take room in the context, whatever `reset`
        // says (zlib-rs 0.6.8), until the next stream finds none and panics.
        *context = new_deflate();
        None
    })
}

fn zstd_decompress(input: &[u8], output: &mut [u8]) -> Result<usize> {
    ZSTD_READER.with_borrow_mut(|slot| {
        let context = match slot {
            Some(context) => context,
            None => slot.insert(Decoder::new().map_err(no_context)?),
        };
        context.reinit().map_err(no_context)?;
        let mut input = InBuffer::around(input);
        let mut output = OutBuffer::around(output);
        // Frame after frame, until the output is full or nothing moves any more.
        while output.pos() < output.capacity() {
            let before = (input.pos(), output.pos());
            context.run(&mut input, &mut output).map_err(invalid)?;
            if (input.pos(), output.pos()) == before {
                break;
            }
        }
        Ok(output.pos())
    })
}

fn zstd_compress(input: &[u8], output: &mut [u8]) -> Result<Option<usize>> {
    ZSTD_WRITER.with_borrow_mut(|slot| {
        let context = match slot {
            Some(context) => context,
            None => slot.insert(
                zstd::bulk::Compressor::new(zstd::DEFAULT_COMPRESSION_LEVEL).map_err(no_context)?,
            ),
        };
        // The only failure of a sound context is an output that is too short.
        Ok(context.compress_to_buffer(input, output).ok())
    })
}

fn no_context(error: std::io::Error) -> Error {
    Error::io(error, "Making a zstd context")
}

#[cfg(test)]
mod tests {
    use flate2::Decompress;

    use super::*;

    const BOTH: [CompressionType; 2] = [CompressionType::Deflate, CompressionType::Zstd];

    /// Bytes that compress to about half, with repeats at every distance.
    fn sample(len: usize) -> Vec<u8> {
        let mut state = 0x2545_f491_4f6c_dd1d_u64;
        let mut bytes = Vec::with_capacity(len);
        while bytes.len() < len {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let distance = usize::try_from(state % 40_000).unwrap() + 1;
            match bytes.len().checked_sub(distance) {
                Some(from) if state & 3 != 0 => {
                    let end = (from + 24).min(bytes.len());
                    bytes.extend_from_within(from..end);
                }
                _ => bytes.extend_from_slice(&state.to_be_bytes()),
            }
        }
        bytes.truncate(len);
        bytes
    }

    fn compressed(kind: CompressionType, input: &[u8]) -> Vec<u8> {
        let mut output = vec![0; input.len()];
        let len = compress(kind, input, &mut output).unwrap().expect("sample compresses");
        output.truncate(len);
        output
    }

    #[test]
    fn clusters_survive_compression_with_anything_behind_the_stream() {
        for kind in BOTH {
            for len in [512, 4096, 65536, 2 << 20] {
                let mut input = sample(len);
                input[len / 4..len / 2].fill(0);
                let mut stream = compressed(kind, &input);
                stream.extend_from_slice(&[0xa5; 300]);
                let mut output = vec![1; len];
                decompress(kind, &stream, &mut output).unwrap();
                assert!(output == input, "{kind:?} {len}");
            }
        }
    }

    #[test]
    fn streams_that_end_early_are_corrupt() {
        for kind in BOTH {
            let stream = compressed(kind, &sample(65536));
            let mut output = vec![0; 65536];
            for cut in [0, 1, stream.len() / 2, stream.len() - 9] {
                let error = decompress(kind, &stream[..cut], &mut output).unwrap_err();
                assert_eq!(error.kind(), crate::ErrorKind::Corrupt, "{kind:?} {cut}");
            }
            // Complete, but for a smaller cluster.
            let error = decompress(kind, &stream, &mut vec![0; 65537]).unwrap_err();
            let text = "Compressed stream ends after 65536 bytes; 65537 would be right";
            assert_eq!(error.to_string(), text, "{kind:?}");
        }
    }

    #[test]
    fn noise_is_not_compressed() {
        let mut noise = sample(8);
        let mut state = 1_u64;
        noise.extend((0..4096).map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            state.to_be_bytes()[0]
        }));
        for kind in BOTH {
            assert_eq!(compress(kind, &noise, &mut vec![0; 8192]).unwrap(), None, "{kind:?}");
            let input = sample(4096);
            assert_eq!(compress(kind, &input, &mut [0; 100]).unwrap(), None, "{kind:?}");
            // The context is sound afterwards.
            compressed(kind, &input);
        }
    }

    #[test]
    fn any_number_of_clusters_that_do_not_compress_leave_the_context_sound() {
        let mut state = 1_u64;
        let mut noise = vec![0; 16384];
        noise.fill_with(|| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            state.to_be_bytes()[0]
        });
        for kind in BOTH {
            for len in [512, 1024, 4096, 16384] {
                let mut output = vec![0; len];
                for _ in 0..300 {
                    assert_eq!(compress(kind, &noise[..len], &mut output).unwrap(), None);
                }
                compressed(kind, &vec![5; len]);
            }
        }
    }

    #[test]
    fn written_deflate_never_looks_back_further_than_4_kib() {
        let input = sample(1 << 20);
        let stream = compressed(CompressionType::Deflate, &input);
        // A strict reader: its window is 4 KiB and its output comes in pieces of 64 bytes, so that
        // older bytes are gone.
        let mut reader = Decompress::new_with_window_bits(false, 12);
        let mut output = Vec::new();
        while output.len() < input.len() {
            let mut piece = [0; 64];
            let (read, written) = (reader.total_in(), reader.total_out());
            let rest = &stream[usize::try_from(read).unwrap()..];
            reader.decompress(rest, &mut piece, FlushDecompress::None).unwrap();
            output.extend_from_slice(
                &piece[..usize::try_from(reader.total_out() - written).unwrap()],
            );
        }
        assert!(output == input);
    }

    #[test]
    fn deflate_with_a_window_of_32_kib_is_read() {
        let input = sample(1 << 20);
        let mut writer = Compress::new(Compression::best(), false);
        let mut stream = vec![0; 1 << 20];
        writer.compress(&input, &mut stream, FlushCompress::Finish).unwrap();
        let mut output = vec![0; 1 << 20];
        decompress(CompressionType::Deflate, &stream, &mut output).unwrap();
        assert!(output == input);
        assert!(writer.total_out() < compressed(CompressionType::Deflate, &input).len() as u64);
    }

    #[test]
    fn several_zstd_frames_make_one_cluster() {
        let input = sample(65536);
        let mut stream = compressed(CompressionType::Zstd, &input[..10_000]);
        stream.extend(compressed(CompressionType::Zstd, &input[10_000..]));
        stream.extend([7; 40]);
        let mut output = vec![0; 65536];
        decompress(CompressionType::Zstd, &stream, &mut output).unwrap();
        assert!(output == input);
    }

    #[test]
    fn zstd_frame_of_a_huge_claimed_size_gives_only_what_was_asked_for() {
        // Magic, 8-byte content size of 2^56, window of 1 KiB, one RLE block of 4096 bytes "x".
        let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0xc0, 0x00];
        frame.extend([0, 0, 0, 0, 0, 0, 0, 1]);
        frame.extend([0x02, 0x20, 0x00, b'x', 0x02, 0x20, 0x00, b'x']);
        let mut output = vec![0; 2048];
        decompress(CompressionType::Zstd, &frame, &mut output).unwrap();
        assert_eq!(output, vec![b'x'; 2048]);
    }

    #[test]
    fn zlib_header_is_not_raw_deflate() {
        let mut writer = Compress::new(Compression::default(), true);
        let mut stream = vec![0; 8192];
        writer.compress(&sample(4096), &mut stream, FlushCompress::Finish).unwrap();
        assert!(decompress(CompressionType::Deflate, &stream, &mut vec![0; 4096]).is_err());
    }
}
