//! Keys of elliptic curves whose private number is longer or shorter than it should be.
//!
//! RFC 5915, section 3, wants as many bytes as the curve has. GnuTLS's `certtool` writes the number as
//! a DER integer would have it: with a zero in front where the highest bit is set, which is in every
//! second key, and without zeros that it begins with. OpenSSL and GnuTLS read those; ring does not.
//!
//! * Never: the number itself changes, or anything else in the key.
//! * What is no key of this kind stays as it is: whoever uses it says what is wrong.

use rustls_pki_types::PrivateKeyDer;

const INTEGER: u8 = 0x02;
const OCTET_STRING: u8 = 0x04;
const OBJECT: u8 = 0x06;
const SEQUENCE: u8 = 0x30;
/// `[0]` of ECPrivateKey: which curve it is.
const PARAMETERS: u8 = 0xa0;

/// 1.2.840.10045.2.1
const EC_PUBLIC_KEY: [u8; 7] = [0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01];
/// 1.2.840.10045.3.1.7
const P256: [u8; 8] = [0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07];
/// 1.3.132.0.34
const P384: [u8; 5] = [0x2b, 0x81, 0x04, 0x00, 0x22];

/// Gives the private number the length that its curve asks for.
pub(crate) fn with_number_of_right_length(key: PrivateKeyDer<'static>) -> PrivateKeyDer<'static> {
    let rewritten = match &key {
        PrivateKeyDer::Sec1(key) => {
            rewrite_sec1(key.secret_sec1_der(), None).map(|der| PrivateKeyDer::Sec1(der.into()))
        }
        PrivateKeyDer::Pkcs8(key) => {
            rewrite_pkcs8(key.secret_pkcs8_der()).map(|der| PrivateKeyDer::Pkcs8(der.into()))
        }
        _ => None,
    };
    rewritten.unwrap_or(key)
}

/// OneAsymmetricKey (RFC 5958): version, algorithm, the key in an octet string, maybe attributes.
fn rewrite_pkcs8(der: &[u8]) -> Option<Vec<u8>> {
    let mut key = Der(der).only(SEQUENCE)?;
    let version = key.next(INTEGER)?;
    let algorithm = key.next(SEQUENCE)?;
    let (mut kind, inner) = (Der(algorithm), key.next(OCTET_STRING)?);
    if kind.next(OBJECT)? != EC_PUBLIC_KEY {
        return None;
    }
    let inner = rewrite_sec1(inner, Some(kind.next(OBJECT)?))?;
    let parts = [
        element(INTEGER, version),
        element(SEQUENCE, algorithm),
        element(OCTET_STRING, &inner),
        key.0.to_vec(),
    ];
    Some(element(SEQUENCE, &parts.concat()))
}

/// ECPrivateKey (RFC 5915): version, the number in an octet string, maybe curve and public key.
fn rewrite_sec1(der: &[u8], curve: Option<&[u8]>) -> Option<Vec<u8>> {
    let mut key = Der(der).only(SEQUENCE)?;
    let version = key.next(INTEGER)?;
    let number = key.next(OCTET_STRING)?;
    let behind = key.0;
    let curve = match curve {
        Some(curve) => curve,
        None => Der(key.next(PARAMETERS)?).next(OBJECT)?,
    };
    let number = fit(number, number_bytes(curve)?)?;
    let parts = [element(INTEGER, version), element(OCTET_STRING, &number), behind.to_vec()];
    Some(element(SEQUENCE, &parts.concat()))
}

fn number_bytes(curve: &[u8]) -> Option<usize> {
    match curve {
        _ if curve == P256 => Some(32),
        _ if curve == P384 => Some(48),
        _ => None,
    }
}

/// Returns the number in `bytes` bytes, if it fits.
fn fit(number: &[u8], bytes: usize) -> Option<Vec<u8>> {
    let zeros = number.iter().take_while(|byte| **byte == 0).count();
    let digits = number.get(zeros..)?;
    let mut fitted = vec![0; bytes.checked_sub(digits.len())?];
    fitted.extend_from_slice(digits);
    Some(fitted)
}

/// Bytes of DER that are not read yet.
struct Der<'a>(&'a [u8]);

impl<'a> Der<'a> {
    /// Takes the content of an element of this kind.
    fn next(&mut self, tag: u8) -> Option<&'a [u8]> {
        let (&[found, first], rest) = self.0.split_first_chunk()?;
        if found != tag {
            return None;
        }
        let (len, rest) = match first {
            0..=0x7f => (usize::from(first), rest),
            0x81 => rest.split_first().map(|(len, rest)| (usize::from(*len), rest))?,
            0x82 => rest
                .split_first_chunk()
                .map(|(len, rest)| (usize::from(u16::from_be_bytes(*len)), rest))?,
            // No key is that long.
            _ => return None,
        };
        let (content, rest) = rest.split_at_checked(len)?;
        self.0 = rest;
        Some(content)
    }

    /// Takes the content of an element that has nothing behind it.
    fn only(mut self, tag: u8) -> Option<Self> {
        let content = self.next(tag)?;
        self.0.is_empty().then_some(Self(content))
    }
}

/// Encodes an element of at most 64 KiB, as all that was read is.
fn element(tag: u8, content: &[u8]) -> Vec<u8> {
    let len = content.len();
    let mut bytes = match len {
        0..=0x7f => vec![tag, len as u8],
        0x80..=0xff => vec![tag, 0x81, len as u8],
        _ => {
            let [high, low] = (len as u16).to_be_bytes();
            vec![tag, 0x82, high, low]
        }
    };
    bytes.extend_from_slice(content);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A number of `number` on P-256, with the public key cut short.
    fn sec1(number: &[u8]) -> Vec<u8> {
        let curve = element(PARAMETERS, &element(OBJECT, &P256));
        let public = element(0xa1, &[3, 2, 0, 4]);
        element(
            SEQUENCE,
            &[element(INTEGER, &[1]), element(OCTET_STRING, number), curve, public].concat(),
        )
    }

    fn pkcs8(number: &[u8]) -> Vec<u8> {
        let algorithm = [element(OBJECT, &EC_PUBLIC_KEY), element(OBJECT, &P256)].concat();
        let parts = [
            element(INTEGER, &[0]),
            element(SEQUENCE, &algorithm),
            element(OCTET_STRING, &sec1(number)),
            element(PARAMETERS, b"attributes"),
        ];
        element(SEQUENCE, &parts.concat())
    }

    #[test]
    fn a_number_gets_the_length_of_its_curve_and_all_else_stays() {
        let right = [&[0, 0][..], &[0xee; 30]].concat();
        for number in [&[0xee; 30][..], &right, &[&[0][..], &right].concat()] {
            assert_eq!(rewrite_sec1(&sec1(number), None), Some(sec1(&right)));
            assert_eq!(rewrite_pkcs8(&pkcs8(number)), Some(pkcs8(&right)));
        }
    }

    #[test]
    fn what_is_no_such_key_stays() {
        let too_long = [0xee; 33];
        assert_eq!(rewrite_sec1(&sec1(&too_long), None), None);
        let (sec1, pkcs8) = (sec1(&[7; 32]), pkcs8(&[7; 32]));
        for len in 0..sec1.len() {
            assert_eq!(rewrite_sec1(&sec1[..len], None), None, "{len} bytes");
        }
        for len in 0..pkcs8.len() {
            assert_eq!(rewrite_pkcs8(&pkcs8[..len]), None, "{len} bytes");
        }
        assert_eq!(rewrite_sec1(&[sec1, vec![0]].concat(), None), None);
    }

    #[test]
    fn lengths_are_encoded_as_they_are_read() {
        for len in [0, 0x7f, 0x80, 0xff, 0x100, 0xffff] {
            let content = vec![7; len];
            assert_eq!(
                Der(&element(OCTET_STRING, &content)).next(OCTET_STRING),
                Some(&content[..])
            );
        }
    }
}
