//! What a guest network is made of: taps, addresses, DHCP, router advertisements, nftables.
//!
//! [`name`] holds the checked names and addresses that everything else is built from; [`nft`] renders them to the
//! firewall that must be in the kernel before the first tap is up.
#![forbid(unsafe_code)]

pub mod name;
pub mod nft;
