//! What a guest network is made of: taps, addresses, DHCP, router advertisements, nftables.
