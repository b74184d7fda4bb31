//! What a guest network is made of: taps, addresses, DHCP, nftables.
//!
//! ```text
//!   guest.rs   a guest's network, up and down      dhcp.rs   its lease
//!   nft.rs     the firewall, rendered and swapped  tap.rs    its link, addressed and routed by netlink
//!   ra.rs      its IPv6 prefix                      groups.rs what security groups let through
//!   kept.rs    what is kept of it for who comes next, and the firewall that follows; mends it
//!   nft/nat.rs, guest/elastic.rs   its public address       flows.rs  connections that end with that
//!   name.rs    checked names: nothing else gets into a ruleset's text
//! ```

pub mod dhcp;
mod flows;
pub mod groups;
pub mod guest;
mod kept;
pub mod name;
pub mod nft;
pub mod ra;
mod served;
pub mod tap;

pub use guest::apart::room;
pub use guest::{Address, GuestNet, NetError, Public, SUBNET, VPC};
pub use kept::{Watch, repair, set_groups};
