# A network of one's own: subnets in two zones, a gateway, routes, interfaces, and an instance in it.

terraform {
  required_providers {
    aws = { source = "hashicorp/aws" }
  }
}

variable "endpoint" { type = string }
variable "region" { type = string }
variable "stage" { default = "test" }
variable "private" { default = true }
variable "description" { default = "first" }

provider "aws" {
  region                  = var.region
  skip_region_validation  = true
  skip_metadata_api_check = true

  endpoints {
    ec2 = var.endpoint
    sts = var.endpoint
  }
}

# The provider knows AWS's regions only.
data "aws_region" "here" {}

data "aws_availability_zones" "all" {}

data "aws_ami" "debian" {
  owners = ["self"]

  filter {
    name   = "name"
    values = ["debian-12"]
  }
}

resource "aws_vpc" "main" {
  cidr_block           = "10.20.0.0/16"
  enable_dns_hostnames = true
  tags                 = { Name = "main", stage = var.stage }
}

resource "aws_default_security_group" "main" {
  vpc_id = aws_vpc.main.id
}

resource "aws_default_route_table" "main" {
  default_route_table_id = aws_vpc.main.default_route_table_id
  tags                   = { Name = "main" }
}

resource "aws_subnet" "public" {
  count                   = 2
  vpc_id                  = aws_vpc.main.id
  cidr_block              = cidrsubnet(aws_vpc.main.cidr_block, 8, count.index)
  availability_zone       = data.aws_availability_zones.all.names[count.index]
  map_public_ip_on_launch = true
  tags                    = { Name = "public ${count.index}", stage = var.stage }
}

resource "aws_subnet" "private" {
  count                = 2
  vpc_id               = aws_vpc.main.id
  cidr_block           = cidrsubnet(aws_vpc.main.cidr_block, 8, count.index + 100)
  availability_zone_id = data.aws_availability_zones.all.zone_ids[count.index]
}

resource "aws_internet_gateway" "main" {
  vpc_id = aws_vpc.main.id
  tags   = { Name = "main" }
}

resource "aws_route_table" "public" {
  vpc_id = aws_vpc.main.id
  tags   = { Name = "public" }
}

resource "aws_route" "internet" {
  route_table_id         = aws_route_table.public.id
  destination_cidr_block = "0.0.0.0/0"
  gateway_id             = aws_internet_gateway.main.id
}

resource "aws_route_table_association" "public" {
  count          = 2
  subnet_id      = aws_subnet.public[count.index].id
  route_table_id = aws_route_table.public.id
}

resource "aws_route_table" "private" {
  vpc_id = aws_vpc.main.id

  route {
    cidr_block           = "192.168.0.0/16"
    network_interface_id = aws_network_interface.router.id
  }
}

resource "aws_route_table_association" "private" {
  count          = 2
  subnet_id      = aws_subnet.private[count.index].id
  route_table_id = var.private ? aws_route_table.private.id : aws_route_table.public.id
}

resource "aws_security_group" "inside" {
  name   = "inside"
  vpc_id = aws_vpc.main.id

  ingress {
    from_port   = 22
    to_port     = 22
    protocol    = "tcp"
    cidr_blocks = [aws_vpc.main.cidr_block]
  }
}

resource "aws_network_interface" "router" {
  subnet_id         = aws_subnet.public[0].id
  private_ips       = ["10.20.0.10"]
  security_groups   = [aws_security_group.inside.id]
  source_dest_check = false
  description       = var.description
  tags              = { Name = "router" }
}

resource "aws_instance" "router" {
  ami           = data.aws_ami.debian.id
  instance_type = "t3.nano"

  network_interface {
    network_interface_id = aws_network_interface.router.id
    device_index         = 0
  }
}

resource "aws_instance" "inside" {
  ami                    = data.aws_ami.debian.id
  instance_type          = "t3.nano"
  subnet_id              = aws_subnet.private[1].id
  vpc_security_group_ids = [aws_security_group.inside.id]
}

# What is there is taken over, not made.
resource "aws_default_vpc" "default" {
  tags = { Name = "default" }
}

resource "aws_default_subnet" "default" {
  availability_zone = data.aws_availability_zones.all.names[0]
}

output "vpc" { value = aws_vpc.main.id }
output "region" { value = data.aws_region.here.name }
output "router" { value = aws_instance.router.id }
output "inside" { value = aws_instance.inside.id }
output "private" { value = aws_subnet.private[*].id }
